"""``OptimManager`` under the published module name."""

from ..optim import OptimManager

__all__ = ["OptimManager"]
