"""From hidden states to the logits of a vocabulary."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from ..shard import DistributedModule, DistributedParameter, ParameterInitializer
from .functional import parallel_linear
from .group import slice_of, tensor_group


class Projection(DistributedModule):
    """``y = x W^T`` with a row of ``W`` for each token.

    ``bmt.init_parameters(model)`` gives the weight a normal distribution.

    Args:
        vocab_size: rows of the weight.
        embedding_size: columns.
        dtype: of the weight.
        init_mean, init_std: of the initial weight.
    """

    _is_split: ClassVar[bool] = False
    """Whether tensor-parallel ranks hold slices of the weight."""

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        dtype: torch.dtype = torch.half,
        init_mean: float = 0.0,
        init_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.weight = DistributedParameter(
            torch.empty(self._rows(), embedding_size, dtype=dtype),
            init_method=ParameterInitializer(torch.nn.init.normal_, mean=init_mean, std=init_std),
            tp_mode=self._is_split,
            tp_split_dim=0,
        )

    def _rows(self) -> int:
        return self.vocab_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., embedding_size) to logits (..., vocab_size)."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self._rows()} of {self.vocab_size}, {self.embedding_size}"


class VPProjection(Projection):
    """A Projection whose rows are split over the tensor-parallel group, which must divide ``vocab_size``."""

    _is_split = True

    def _rows(self) -> int:
        return slice_of(self.vocab_size, "vocab_size")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """To the logits of this rank's slice of the vocabulary, for ``FusedCrossEntropy(parallel=True)``."""
        return parallel_linear(x, self.weight, None, tensor_group())
