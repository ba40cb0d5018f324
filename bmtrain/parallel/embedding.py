"""An embedding split by vocabulary."""

from __future__ import annotations

import copy
import types
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

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

    It is tried: once as it is, and once where the weight is not to be had but by ``nn.Embedding.forward``.  On the CPU:
    a token that is no row is an error there, on a GPU it is the end of the process.
    """
    own = type(module)
    if own.forward is nn.Embedding.forward and "forward" not in vars(module):
        return None
    try:
        same = _is_same_without_its_weight(module, ranks)
    except Exception as error:
        return (
            f"{own.__name__}, an embedding with a forward of its own that cannot be tried on the CPU with tokens "
            f"alone: {error}"
        )
    if same:
        return None
    return (
        f"{own.__name__}, an embedding with a forward of its own, which can be split only if that takes its rows from "
        "one call of super().forward and goes by nothing else of the weight"
    )


def _is_same_without_its_weight(module: nn.Embedding, ranks: int) -> bool:
    rows, (length, width), dtype = module.num_embeddings, module.weight.shape, module.weight.dtype
    tokens = torch.tensor([[0, rows // 2, rows - 1]], device="cpu")
    # No two rows of the table are alike, and it takes the memory of one row and one column.
    numbers = torch.randn(length + width - 1, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    table = numbers.to(dtype).unfold(0, width, 1)
    slice_ = torch.full((), float("nan"), dtype=dtype, device="cpu").expand(length // ranks, width)
    same = True
    for trains in (False, True):
        plain, tried = _on_cpu(module, table), cast(_Tried, _on_cpu(module, slice_))
        tried.__class__ = _between(type(module), _Tried)  # type: ignore[arg-type]
        plain.training, tried.training, tried.tried_table, tried.tried_calls = trains, trains, table, 0
        same = same and torch.equal(_tried_out(tried, tokens), _tried_out(plain, tokens)) and tried.tried_calls == 1
    return same


def _on_cpu(module: nn.Embedding, weight: torch.Tensor) -> nn.Embedding:
    """A copy whose tensors are on the CPU, and its own, with ``weight`` for the weight."""
    replaced = module.weight
    made: dict[int, Any] = {id(replaced): nn.Parameter(weight, requires_grad=False)}

    def copy_tensor(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            copied = tensor.detach().to("cpu", copy=True)
            made[id(tensor)] = nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied
        return made[id(tensor)]

    def copy_module(module: nn.Module) -> Any:
        if id(module) not in made:
            copied = made[id(module)] = copy.copy(module)
            vars(copied).update(tree_map_only(torch.Tensor, copy_tensor, vars(module)))
            for name, child in module._modules.items():
                copied._modules[name] = None if child is None else copy_module(child)
        return made[id(module)]

    return cast(nn.Embedding, copy_module(module))


def _tried_out(module: nn.Module, tokens: torch.Tensor) -> Any:
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
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
