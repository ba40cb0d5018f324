"""An embedding split by vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..comm import Communicator
from ..shard import DistributedModule, DistributedParameter, ParameterInitializer
from .functional import ReduceOutput, apply_over, drawn_for, parallel_linear
from .group import slice_of, tensor_group


class VPEmbedding(DistributedModule):
    """An embedding whose rows are split over the tensor-parallel group.

    ``bmt.init_parameters(model)`` gives the weight a normal distribution.

    Args:
        vocab_size: rows of the whole table, a multiple of the group's size.
        embedding_size: columns.
        dtype: of the weight.
        init_mean, init_std: of the initial weight.
        padding_idx: the token whose row gets no gradient, as for nn.Embedding.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        dtype: torch.dtype = torch.half,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.padding_idx = padding_idx
        self.embedding_size = embedding_size
        self.vocab_size_per_partition = slice_of(vocab_size, "vocab_size")
        self.weight = DistributedParameter(
            torch.empty(self.vocab_size_per_partition, embedding_size, dtype=dtype),
            init_method=ParameterInitializer(torch.nn.init.normal_, mean=init_mean, std=init_std),
            tp_mode=True,
            tp_split_dim=0,
        )

    def forward(self, x: torch.Tensor, projection: bool = False) -> torch.Tensor:
        """Token numbers (...) to embeddings (..., embedding_size).

        With ``projection``, hidden states (..., embedding_size) to the logits of this rank's slice of the vocabulary,
        for ``FusedCrossEntropy(parallel=True)``.
        """
        if projection:
            return parallel_linear(x, self.weight, None, tensor_group())
        return vocab_parallel_embedding(x, self.weight, tensor_group(), self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.vocab_size_per_partition} of {self.vocab_size}, {self.embedding_size}"


def vocab_parallel_embedding(
    tokens: torch.Tensor, weight: torch.Tensor, comm: Communicator, padding_idx: int | None = None
) -> torch.Tensor:
    """``F.embedding`` with this rank's slice (V / n, D) of the table; the same result on all ranks."""
    if comm.world_size == 1:
        return F.embedding(tokens, weight, padding_idx)
    index = tokens - comm.rank * weight.shape[0]
    elsewhere = torch.zeros_like(index, dtype=torch.bool)  # a token that is nowhere is an error on one rank
    if comm.rank > 0:
        elsewhere |= index < 0
    if comm.rank < comm.world_size - 1:
        elsewhere |= index >= weight.shape[0]
    rows = F.embedding(index.masked_fill(elsewhere, 0), weight)
    if padding_idx is not None:
        rows = torch.where((tokens == padding_idx).unsqueeze(-1), rows.detach(), rows)
    whole = apply_over(ReduceOutput, rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), comm)
    return drawn_for(whole, comm, split=False)
