"""The layers of ``parallel`` under the published name."""

from ..parallel import ColumnParallelLinear, Linear, OpLinear, OpParallelLinear, RowParallelLinear, VPEmbedding

__all__ = ["ColumnParallelLinear", "Linear", "OpLinear", "OpParallelLinear", "RowParallelLinear", "VPEmbedding"]
