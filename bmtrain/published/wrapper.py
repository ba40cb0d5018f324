"""``BMTrainModelWrapper`` under the published module name."""

from ..block import BMTrainModelWrapper

__all__ = ["BMTrainModelWrapper"]
