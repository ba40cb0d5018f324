"""Loss functions."""

from .cross_entropy import FusedCrossEntropy
from .gather_batch import gather_batch
from .linear_cross_entropy import linear_cross_entropy
from .mean import mean
from .mean_over_ranks import mean_over_ranks
from .vocab_parallel import vocab_parallel_cross_entropy

__all__ = [
    "FusedCrossEntropy", "gather_batch", "linear_cross_entropy", "mean", "mean_over_ranks",
    "vocab_parallel_cross_entropy",
]  # fmt: skip
