"""The layers of ``parallel`` under the published name."""

from ..parallel import (
    ColumnParallelLinear,
    Linear,
    OpLinear,
    OpParallelLinear,
    Projection,
    RowParallelLinear,
    VPEmbedding,
    VPProjection,
)

__all__ = [
    "ColumnParallelLinear", "Linear", "OpLinear", "OpParallelLinear", "Projection", "RowParallelLinear", "VPEmbedding",
    "VPProjection",
]  # fmt: skip
