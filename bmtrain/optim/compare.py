"""Whether what several ranks keep is still the same on all of them: parameters, optimizer states and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from ..alike import differing_ranks, on_all_ranks
from ..block.first_steps.buffers import buffers_of
from ..context import context
from ..errors import RankDivergenceError
from ..shard.engine import MOST_RUNS, Run
from ..shard.flat import FlatShard
from ..shard.in_parts import Owned, in_parts
from ..shard.sharded_tensor import ShardedTensor
from ..topology import Dimension
from .origin import names_of
from .pieces import all_params, homes_of

Kept = tuple[torch.Tensor, tuple[Dimension, ...]]
"""This rank's values, and along which dimensions of the mesh ranks keep the same."""

_DATA: tuple[Dimension, ...] = ("replicate", "shard")
_MOST = 5  # names in an error


def compare(number: int, optimizers: Sequence[torch.optim.Optimizer], runs: Sequence[Run | None]) -> None:
    """Raises RankDivergenceError on every rank when values that ranks keep alike differ in a bit.  Collective.

    Running statistics of batch norms are each rank's own between evaluations, and are left out.
    """
    ctx = context()
    if ctx.world_size == 1:
        return
    those = on_all_ranks(ctx, runs, MOST_RUNS)
    found = differing_ranks(ctx, {name: kept for part in _parts(optimizers, those) for name, kept in part})
    if found is None:
        raise RankDivergenceError(
            f"After step {number} the ranks have other parameters, optimizer states or buffers: they hold different "
            "modules, or ran different ones in this step."
        )
    if found:
        said = [f"{name} (on rank {', '.join(map(str, ranks))})" for name, ranks in found.items()]
        more = f" and {len(said) - _MOST} more" if len(said) > _MOST else ""
        raise RankDivergenceError(
            f"After step {number} ranks differ in what all of them should keep alike: {', '.join(said[:_MOST])}{more}. "
            "Something has changed it on some ranks only: code that ranks run differently, or a device or memory that "
            "has failed."
        )


def _parts(optimizers: Sequence[torch.optim.Optimizer], runs: Sequence[Run]) -> Iterator[Iterator[tuple[str, Kept]]]:
    names = names_of(runs)
    for number, optimizer in enumerate(optimizers):
        yield _parameters(number, optimizer, names)
        yield _states(number, optimizer)
    yield _buffers(runs)


def _parameters(number: int, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[tuple[str, Kept]]:
    for at, home in enumerate(homes_of(all_params(optimizer.param_groups))):
        dimensions: tuple[Dimension, ...] = _DATA
        if isinstance(home, FlatShard):
            dimensions = ("replicate",) if home.is_slice else ("replicate", "tensor")
            if len(context().topology.mesh.group(*dimensions)) == 1:
                continue
        for index, parameter in enumerate(home.params):
            name = names.get(id(parameter), f"parameter {at}.{index} of optimizer {number}")
            yield name, (home.local(home.shard, index), dimensions)


def _states(number: int, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Kept]]:
    own = in_parts(optimizer)
    if own is None:
        return
    none = torch.empty(0, device="meta")
    is_replicated = context().topology.mesh.size("replicate") > 1
    leaves, _ = tree_flatten_with_path(own.parts()["state"], is_leaf=lambda value: isinstance(value, Owned))
    for path, value in leaves:
        name = f"state of optimizer {number}, {keystr(path)}"
        if isinstance(value, ShardedTensor | Owned):
            if is_replicated:
                here = value.part.read() if isinstance(value, ShardedTensor) else value.values
                yield name, (none if here is None else here, ("replicate",))
        elif isinstance(value, torch.Tensor):
            yield name, (value, _DATA)


def _buffers(runs: Sequence[Run]) -> Iterator[tuple[str, Kept]]:
    for name, buffer in buffers_of(dict.fromkeys(run.module for run in runs)):
        yield name, (buffer, _DATA)
