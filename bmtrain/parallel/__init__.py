"""Linear layers and embeddings whose weights are split over the tensor-parallel group."""

from .embedding import VPEmbedding
from .functional import OpParallelLinear, parallel_linear
from .linear import Linear, OpLinear
from .plan import parallelize_module
from .projection import Projection, VPProjection
from .tensor import ColumnParallelLinear, RowParallelLinear

__all__ = [
    "ColumnParallelLinear",
    "Linear",
    "OpLinear",
    "OpParallelLinear",
    "Projection",
    "RowParallelLinear",
    "VPEmbedding",
    "VPProjection",
    "parallel_linear",
    "parallelize_module",
]
