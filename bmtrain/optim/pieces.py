"""What an optimizer works on: the parts of flat shards that belong to its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..context import Context, context
from ..errors import ConfigurationError
from ..shard.flat import FlatShard, flat_of, place_of
from ..shard.parameter import DistributedParameter
from ..shard.pools import views_of

ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Neighbouring parameters of one flat shard, as a range of this rank's shard."""

    flat: FlatShard
    indices: tuple[int, ...]
    start: int
    end: int

    @property
    def grad(self) -> torch.Tensor:
        """(n,) this rank's part of the gradient, to be multiplied by the flat gradient's ``factor`` and ``weight``."""
        return self.flat.gradient.values()[0][self.start : self.end]


def flats_of(params: Iterable[Any]) -> list[FlatShard]:
    """The flat shards that hold ``params``, each once, in order.

    Raises ConfigurationError for a parameter that no distributed module holds.
    """
    found: dict[int, FlatShard] = {}
    for number, parameter in enumerate(params):
        flat = flat_of(parameter)
        if flat is None:
            raise ConfigurationError(
                f"Parameter number {number}, of shape {tuple(parameter.shape)}, is not sharded, so its gradient would "
                "not be reduced. Let its module's class derive from bmt.DistributedModule, or call "
                "bmt.BMTrainModelWrapper(model), before the optimizer is made."
            )
        found[id(flat)] = flat
    return list(found.values())


def all_params(groups: Sequence[ParamGroup]) -> list[DistributedParameter]:
    """Every parameter of the groups, in order."""
    return [p for group in groups for p in group["params"]]


def params_of(groups: Any) -> list[DistributedParameter]:
    """The parameters of an optimizer's ``param_groups``, of an iterable of parameters, or of one parameter."""
    items: list[Any] = [groups] if isinstance(groups, torch.Tensor) else list(groups)
    return [p for item in items for p in (item["params"] if isinstance(item, dict) else [item])]


def agree_on_touched(flats: Sequence[FlatShard]) -> list[list[bool]]:
    """For each parameter of each flat shard, whether any rank has a gradient for it.  Collective.

    Ranks may differ: an expert may have had tokens on one rank only.  A rank that has all gradients knows the answer
    without waiting for its device.
    """
    flags = [t and f.gradient.present for f in flats for t in f.gradient.touched]
    ctx = context()
    if ctx.world_size > 1 and flags:
        device, whole = ctx.device.torch_device, all(flags)
        shared = torch.ones(len(flags), dtype=torch.uint8, device=device) if whole else torch.tensor(
            flags, dtype=torch.uint8, device=device
        )  # fmt: skip
        ctx.world.all_reduce(shared, "max")
        if not whole:
            flags = [bool(x) for x in shared.tolist()]
    out, at = [], 0
    for flat in flats:
        out.append(flags[at : at + len(flat.params)])
        if flat.gradient.reached is not None:
            flat.warn_of_untrained(out[-1])
        at += len(flat.params)
    return out


def pieces(params: Sequence[DistributedParameter], keys: dict[int, Any] | None = None) -> Iterator[tuple[Piece, Any]]:
    """Join neighbours among ``params`` that have the same key.  Empty pieces are left out.

    Gaps between neighbours are zeros in values, gradients and moments, and stay so.
    """
    wanted: dict[int, tuple[FlatShard, dict[int, Any]]] = {}
    for parameter in params:
        flat, index = place_of(parameter)
        wanted.setdefault(id(flat), (flat, {}))[1][index] = keys[id(parameter)] if keys is not None else None
    for flat, chosen in wanted.values():
        run: list[int] = []
        for index in [*sorted(chosen), -1]:
            if run and (index != run[-1] + 1 or chosen[index] != chosen[run[-1]]):
                piece = _piece(flat, run)
                if piece.end > piece.start:
                    yield piece, chosen[run[0]]
                run = []
            run.append(index)


def _piece(flat: FlatShard, indices: Sequence[int]) -> Piece:
    slots, rank = flat.layout.slots, flat.unit.ctx.rank
    first, last = flat.layout.shard_range(rank)
    start = min(max(slots[indices[0]].start, first), last)
    end = max(min(slots[indices[-1]].end, last), start)
    return Piece(flat, tuple(indices), start - first, end - first)


def follow(master: torch.Tensor | None, flat: FlatShard, seen: int, device: torch.device) -> torch.Tensor:
    """The fp32 master of ``flat``, brought up to date if its values changed since version ``seen``.

    Only what changed is taken over: elsewhere the master knows more digits than the parameter.
    """
    if master is None:
        return flat.shard.to(device=device, dtype=torch.float32, copy=True)
    if seen == flat.version:
        return master
    values = flat.shard.to(device)
    return torch.where(master.to(flat.dtype) == values, master, values.float())


def gather_flat(flat: FlatShard, shard_like: torch.Tensor) -> list[torch.Tensor]:
    """Whole CPU tensors, one for each parameter, from a tensor laid out like ``flat.shard``.  Collective."""
    ctx: Context = flat.unit.ctx
    device = ctx.device.torch_device
    whole = torch.empty(flat.layout.numel, dtype=shard_like.dtype, device=device)
    ctx.world.all_gather(shard_like.to(device).contiguous(), whole)
    return [view.to("cpu", copy=True) for view in views_of(whole, flat.layout)]
