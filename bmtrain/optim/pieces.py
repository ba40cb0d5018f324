"""What an optimizer works on: the parts of flat shards that belong to its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..context import Context
from ..shard.engine import engine
from ..shard.flat import FlatShard, flat_of
from ..shard.pools import views_of
from ..shard.unit import ShardUnit
from .replicated import Replicated, average

K = TypeVar("K")
ParamGroup = dict[str, Any]
Home = FlatShard | Replicated
"""Where a parameter lies."""
_TOGETHER = 2**25
"""Elements of shards to update at a time: a GPU takes some 0.3 milliseconds for them, more than the host for a launch,
and gathers of what is updated can begin."""


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
    others = replicated_of(params)
    _finish(others)
    return others


def _finish(others: Sequence[Replicated]) -> None:
    engine().finish_backward()
    average(others)


def all_params(groups: Sequence[ParamGroup]) -> list[Any]:
    """Every parameter of the groups, in order."""
    return [p for group in groups for p in group["params"]]


def params_of(groups: Any) -> list[Any]:
    """The parameters of an optimizer's ``param_groups``, of an iterable of parameters, or of one parameter."""
    items: list[Any] = [groups] if isinstance(groups, torch.Tensor) else list(groups)
    return [p for item in items for p in (item["params"] if isinstance(item, dict) else [item])]


def begin_step(homes: Sequence[Home]) -> list[list[bool]]:
    """An optimizer is about to step on ``homes``: for each parameter of each, whether any rank has a gradient for it.

    All ranks call it alike, after ``finish_gradients``.  What they have may differ, as an expert may have had tokens on
    one rank only; a rank that has all gradients waits for nobody.
    """
    out = [home.gradient.used() for home in homes]
    flats = [(home, used) for home, used in zip(homes, out, strict=True) if isinstance(home, FlatShard)]
    if flats:
        engine().note_step()
    for flat, used in flats:
        if flat.gradient.reached is not None:
            flat.warn_of_untrained(used)
    return out


class Chosen:
    """Parameters and where they lie, to be remembered from step to step.

    Attributes:
        flats: the flat shards that hold some.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        self._params, self._places = params, _places(params)
        self.flats = flats_of(params)
        indices: dict[int, dict[int, None]] = {flat.key: {} for flat in self.flats}
        for parameter in params:
            home, index = home_of(parameter)
            indices.setdefault(home.key, {})[index] = None
        self._pieces = [piece for flat in self.flats for piece, _ in pieces_of(flat, indices[flat.key])]
        self._in_part = {
            flat.key: [*indices[flat.key]] for flat in self.flats if len(indices[flat.key]) < len(flat.params)
        }
        self._has_others = len(indices) > len(self.flats)

    def fits(self, params: Sequence[Any]) -> bool:
        """Whether it is about ``params``, and they lie where they did."""
        return len(params) == len(self._params) and self._places == _places(params)

    @property
    def replicated(self) -> list[Replicated]:
        """What holds the others."""
        return replicated_of(self._params) if self._has_others else []

    def indices_in(self, flat: FlatShard) -> list[int] | None:
        """Which of ``flat``'s parameters are among these; None for all."""
        return self._in_part.get(flat.key)

    @property
    def present(self) -> list[Piece]:
        """This rank's parts of all that have a gradient, neighbours joined.  Empty pieces are left out."""
        found = [piece for piece in self._pieces if piece.flat.gradient.present]
        for home in self.replicated:
            if home.gradient.present:
                found += [piece for piece, _ in pieces_of(home, {0: None})]
        return found

    def finish_gradients(self) -> None:
        """Reduce what is not reduced yet.  Collective."""
        _finish(self.replicated)


def _places(params: Iterable[Any]) -> list[tuple[int, int]]:
    """Which parameters, and in which flat shards: the same as long as those live, whose ids these are."""
    return [(id(parameter), id(getattr(parameter, "_flat", None))) for parameter in params]


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


def in_batches(units: Sequence[ShardUnit]) -> Iterator[list[ShardUnit]]:
    """``units`` in their order, in parts of about so many elements; the same on all ranks."""
    batch, size = list[ShardUnit](), 0
    for unit in units:
        batch.append(unit)
        size += sum(flat.layout.shard_numel for flat in unit.flats)
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
