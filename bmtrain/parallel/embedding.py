"""An embedding split by vocabulary."""

from __future__ import annotations

import copy
import types
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

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


class _SplitEmbedding(nn.Embedding):
    """Comes behind a class of its own forward, which asks this one for the rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_embedding(input, self.weight, tensor_group(), self.padding_idx)


def split_in_place(module: nn.Embedding) -> nn.Embedding:
    """Let ``module``, of a class derived from nn.Embedding, hold this rank's rows, as its weight does already."""
    module.__class__ = _between(type(module), _SplitEmbedding)  # type: ignore[arg-type]
    return module


@cache
def _between(own: type[nn.Embedding], other: type[nn.Embedding]) -> type[Any]:
    def body(namespace: dict[str, Any]) -> None:
        namespace.update(__module__=own.__module__, __qualname__=own.__qualname__, __doc__=own.__doc__)

    return types.new_class(own.__name__, (own, other), {}, body)


class _Tried(nn.Embedding):
    """Comes there to see what the other does with the rows."""

    tried_table: torch.Tensor
    tried_calls: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.tried_calls += 1
        return F.embedding(input, self.tried_table, self.padding_idx)


def why_not_split(module: nn.Embedding, ranks: int) -> str | None:
    """Why a forward of its own needs more than the rows that ``nn.Embedding.forward`` gives; None if it does not.

    It is tried: once as it is, and once where the weight is not to be had but by ``nn.Embedding.forward``.
    """
    own = type(module)
    if own.forward is nn.Embedding.forward and "forward" not in vars(module):
        return None
    rows = module.num_embeddings
    tokens = torch.tensor([[0, rows // 2, rows - 1]], device=module.weight.device)
    plain, tried = copy.copy(module), cast(_Tried, copy.copy(module))
    tried.__class__ = _between(own, _Tried)  # type: ignore[arg-type]
    tried.tried_table, same = module.weight.detach(), True
    slice_ = torch.full_like(module.weight[: rows // ranks], float("nan"))
    tried._parameters = {**module._parameters, "weight": nn.Parameter(slice_)}
    try:
        for trains in (False, True):
            plain.training, tried.training, tried.tried_calls = trains, trains, 0
            same = same and torch.equal(_tried_out(tried, tokens), _tried_out(plain, tokens)) and tried.tried_calls == 1
    except Exception as error:
        return f"{own.__name__}, an embedding with a forward of its own that cannot be tried with tokens alone: {error}"
    if same:
        return None
    return (
        f"{own.__name__}, an embedding with a forward of its own, which can be split only if that takes its rows from "
        "one call of super().forward and goes by nothing else of the weight"
    )


def _tried_out(module: nn.Module, tokens: torch.Tensor) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return module(tokens)


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
