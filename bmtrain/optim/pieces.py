"""What an optimizer works on: the parts of flat shards that belong to its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..context import Context, context
from ..shard.engine import engine
from ..shard.flat import FlatShard, flat_of
from ..shard.pools import views_of
from .replicated import Replicated, average

K = TypeVar("K")
ParamGroup = dict[str, Any]
Home = FlatShard | Replicated
"""Where a parameter lies."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring parameters of one home, as a range of this rank's shard."""

    flat: Home
    indices: tuple[int, ...]
    start: int
    end: int

    @property
    def grad(self) -> torch.Tensor:
        """(n,) this rank's part of the gradient, to be multiplied by the flat gradient's ``factor`` and ``weight``."""
        return self.flat.gradient.values()[0][self.start : self.end]


def homes_of(params: Iterable[Any]) -> list[Home]:
    """What holds ``params``: flat shards, each once, in order, and Replicated ones for what no module holds."""
    found: dict[int, Home] = {}
    for parameter in params:
        flat = getattr(parameter, "_flat", None)  # flat_of, without a call for each of them
        if flat is not None:
            found[id(flat)] = flat
        elif id(parameter) not in found:
            found[id(parameter)] = Replicated(parameter)
    return list(found.values())


def flats_of(params: Iterable[Any]) -> list[FlatShard]:
    """The flat shards among ``homes_of(params)``."""
    return list({id(flat): flat for flat in map(flat_of, params) if flat is not None}.values())


def replicated_of(params: Iterable[Any]) -> list[Replicated]:
    """The others."""
    others = [p for p in params if getattr(p, "_flat", None) is None]
    return [Replicated(p) for p in {id(p): p for p in others}.values()] if others else []


def home_of(parameter: Any) -> tuple[Home, int]:
    """What holds ``parameter``, and its index there."""
    flat = getattr(parameter, "_flat", None)
    return (Replicated(parameter), 0) if flat is None else (flat, parameter._index)


def finish_gradients(params: Iterable[Any]) -> list[Replicated]:
    """Reduce every gradient of ``params`` that is not reduced yet.  Collective.

    Returns what holds those that lie in no flat shard.
    """
    engine().finish_backward()
    others = replicated_of(params)
    average(others)
    return others


def all_params(groups: Sequence[ParamGroup]) -> list[Any]:
    """Every parameter of the groups, in order."""
    return [p for group in groups for p in group["params"]]


def params_of(groups: Any) -> list[Any]:
    """The parameters of an optimizer's ``param_groups``, of an iterable of parameters, or of one parameter."""
    items: list[Any] = [groups] if isinstance(groups, torch.Tensor) else list(groups)
    return [p for item in items for p in (item["params"] if isinstance(item, dict) else [item])]


def agree_on_touched(flats: Sequence[Home]) -> list[list[bool]]:
    """For each parameter of each home, whether any rank has a gradient for it.  Collective.

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
        if isinstance(flat, FlatShard) and flat.gradient.reached is not None:
            flat.warn_of_untrained(out[-1])
        at += len(flat.params)
    return out


def pieces(params: Iterable[Any]) -> list[Piece]:
    """This rank's parts of ``params``, neighbours joined.  Empty pieces are left out."""
    wanted: dict[int, tuple[Home, dict[int, None]]] = {}
    for parameter in params:
        flat, index = home_of(parameter)
        found = wanted.get(flat.key)
        if found is None:
            found = wanted[flat.key] = (flat, {})
        found[1][index] = None
    return [piece for flat, chosen in wanted.values() for piece, _ in pieces_of(flat, chosen)]


def pieces_of(home: Home, chosen: Mapping[int, K]) -> list[tuple[Piece, K]]:
    """Neighbours among ``chosen``, parameters of ``home`` by index, that have the same value there.

    Gaps between neighbours are zeros in values, gradients and moments, and stay so.  Empty pieces are left out.
    """
    found, run = [], list[int]()
    for index in [*sorted(chosen), -1]:
        if run and (index != run[-1] + 1 or chosen[index] != chosen[run[-1]]):
            piece = _piece(home, run)
            if piece.end > piece.start:
                found.append((piece, chosen[run[0]]))
            run = []
        run.append(index)
    return found


def _piece(flat: Home, indices: Sequence[int]) -> Piece:
    slots, rank = flat.layout.slots, flat.unit.ctx.shard_rank if isinstance(flat, FlatShard) else 0
    first, last = flat.layout.shard_range(rank)
    start = min(max(slots[indices[0]].start, first), last)
    end = max(min(slots[indices[-1]].end, last), start)
    return Piece(flat, tuple(indices), start - first, end - first)


def follow(master: torch.Tensor | None, flat: Home, seen: float, device: torch.device) -> torch.Tensor:
    """The fp32 master of ``flat``, brought up to date if its values changed since version ``seen``.

    Only what changed is taken over: elsewhere the master knows more digits than the parameter.
    """
    if master is None:
        return flat.shard.to(device=device, dtype=torch.float32, copy=True)
    if seen == flat.version:
        return master
    values = flat.shard.to(device)
    return torch.where(master.to(flat.dtype) == values, master, values.float())


def gather_whole(flat: FlatShard, shard_like: torch.Tensor) -> list[torch.Tensor]:
    """Whole tensors, one for each parameter, from a tensor laid out like ``flat.shard``.  Collective.

    They are views of one buffer; on one rank, where ``shard_like`` is, of that.
    """
    ctx: Context = flat.unit.ctx
    device = ctx.device.torch_device
    if ctx.world_size == 1:
        return views_of(shard_like, flat.layout)
    return views_of(flat.whole_of(shard_like.to(device)), flat.layout)


def gather_state(home: Home, shard_like: torch.Tensor) -> list[torch.Tensor]:
    """Whole CPU tensors, one for each parameter, from a tensor laid out like ``home.shard``.  Collective."""
    if not isinstance(home, FlatShard):
        return [home.whole(shard_like).to("cpu", copy=True)]
    return [home.joined(index, own).to("cpu", copy=True) for index, own in enumerate(gather_whole(home, shard_like))]
