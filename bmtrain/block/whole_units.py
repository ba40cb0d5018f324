"""Which units are whole now, and why."""

from __future__ import annotations

import enum
import gc
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..shard.flat import FlatShard
from ..shard.unit import ShardUnit, State, prefetch_all


class Reason(enum.Enum):
    """Why a unit is whole or on its way.

    STAYING: the plan for memory lets it stay from one step to the next.
    KEPT: it stays from its forward to the end of the backward: as it was asked for (ZeRO-2), or since somebody has
        views of its parameters (``ctx.weight = weight`` in an ``autograd.Function``), whose memory none else may have.
    USED: it was made whole last; whoever did computes with it.
    PINNED: a running forward, or code inside ``bmt.gathered``, needs it.
    NEAR: nobody needs it now; it was used or is predicted, and may be released whenever its memory is wanted, since
        whoever needs it gathers it again.
    """

    STAYING = enum.auto()
    KEPT = enum.auto()
    USED = enum.auto()
    PINNED = enum.auto()
    NEAR = enum.auto()


_ENDS: list[Callable[[], object]] = [
    partial(gc.collect, 1),
    *(partial(time.sleep, 0.001 * 2**i) for i in range(7)),
    gc.collect,
]
"""What ends views that nobody will read, young garbage first; asked once of a unit that is viewed for longer."""


class WholeUnits:
    """Keeps at most ``limit`` units whole that are USED or NEAR, beside all that are STAYING, KEPT or
    PINNED.

    ``limit`` 2 is the one in use and the one coming: the two parameter buffers per block shape.

    Attributes:
        storages: by the address of a gather buffer's memory, the whole FlatShard that it holds.
    """

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit
        self._units: OrderedDict[int, ShardUnit] = OrderedDict()  # least recently used first
        # Others, STAYING and set back.  Their model may go, in each rank's own time; those above count for what is
        # released next, on all ranks alike.
        self._staying: dict[int, weakref.ref[ShardUnit]] = {}
        self.storages: dict[int, FlatShard] = {}
        self._used: ShardUnit | None = None
        self._forwards: list[list[ShardUnit]] = [[]]  # what each running forward has pinned; at the bottom none runs

    def why(self, unit: ShardUnit) -> Reason | None:
        """Why ``unit`` is whole or on its way; None if it is neither."""
        if unit.index not in self._units and unit.index not in self._staying:
            return None
        if unit.is_kept:
            return Reason.STAYING
        if unit.keep or unit.is_seen:
            return Reason.KEPT
        if unit is self._used:
            return Reason.USED
        return Reason.PINNED if unit.pins else Reason.NEAR

    # -- moves ----------------------------------------------------------------------------------------------------

    def gather(self, unit: ShardUnit, compute: torch.dtype | None = None) -> None:
        """Make ``unit`` whole now, gathered for ``compute`` (unless it is pinned otherwise); None: as it rests."""
        if not unit.pins and not unit.is_seen and (not unit.fits(compute) or unit.is_whole_apart):
            self.release(unit)
        if not unit.is_whole:
            if unit.state is State.SHARDED and not unit.stays and unit.stage is None:
                self._make_room()
            unit.gather(compute)
            for flat in unit.flats:
                assert flat.buffer is not None
                self.storages[flat.buffer.tensor.untyped_storage().data_ptr()] = flat
        self._staying.pop(unit.index, None)
        self._units[unit.index] = unit
        self._units.move_to_end(unit.index)
        if unit.stage is None:  # else other ranks would not know
            self._used = unit

    def prefetch(self, unit: ShardUnit, compute: torch.dtype | None = None) -> None:
        """Start gathering ``unit``, which will be needed next."""
        if unit.is_whole_apart:
            self.release(unit)
        if unit.state is State.SHARDED:
            self.gather_anew([(unit, compute)])

    def is_in_place_of(self, unit: ShardUnit, others: Collection[ShardUnit]) -> bool:
        """Whether one of ``others``, which are used, would have to be released for ``unit``."""
        if unit.state is not State.SHARDED or unit.stays or unit.stage is not None:
            return False
        return any(other in others for other in self._to_release())

    def gather_anew(self, wanted: Sequence[tuple[ShardUnit, torch.dtype | None]]) -> None:
        """The same for several units, each for its dtype; those on their way are gathered once more."""
        for unit, _ in wanted:
            if unit.state is State.SHARDED and not unit.stays and unit.stage is None:
                self._make_room()
        prefetch_all(wanted)
        for unit, _ in wanted:
            if unit.is_kept and not unit.is_whole:
                self._stay(unit)
            elif not unit.is_whole:
                self._units[unit.index] = unit

    def release(self, unit: ShardUnit) -> None:
        """Give up ``unit``'s whole values."""
        self._forget(unit)
        unit.release()
        self._units.pop(unit.index, None)
        self._staying.pop(unit.index, None)
        if self._used is unit:
            self._used = None

    def let_go(self, unit: ShardUnit) -> None:
        """Nobody needs ``unit`` now: release it, or set it back if it stays."""
        if not unit.is_kept:
            self.release(unit)
            return
        self.set_back(unit)
        self._stay(unit)

    def let_go_of_all(self) -> None:
        """The same for every unit that no running forward has pinned."""
        for unit in list(self._units.values()):
            if not unit.pins:
                self.let_go(unit)
        for index, reference in list(self._staying.items()):
            staying = reference()
            if staying is None:
                del self._staying[index]
            elif not staying.is_kept:
                self.release(staying)

    def _stay(self, unit: ShardUnit) -> None:
        unit.is_seen = False  # what it has is its own now
        self._units.pop(unit.index, None)
        self._staying[unit.index] = weakref.ref(unit)
        if self._used is unit:
            self._used = None

    def set_back(self, unit: ShardUnit, looks: bool = True) -> None:
        """Show ``unit``'s parameters sharded, unless it is pinned, but keep what is whole for a use to come.

        And for whoever has views of it, unless nobody ``looks`` for those.
        """
        if not unit.pins and unit.is_whole:
            self._forget(unit)
            unit.set_back()
            unit.is_seen = unit.is_seen or (looks and _is_viewed(unit))

    def leave(self, unit: ShardUnit) -> None:
        """Whoever computed with ``unit`` is through, the forward around it goes on, and asks again for parameters."""
        if not (unit.is_kept or unit.keep):
            self.set_back(unit)

    def set_back_all(self) -> None:
        """The same for every unit: a forward is over, and its backward is to come."""
        for unit in self._units.values():
            self.set_back(unit)

    def flat_at(self, tensor: torch.Tensor) -> FlatShard | None:
        """The whole FlatShard (None if none) of whose gather buffer ``tensor`` is a part."""
        if tensor.layout is not torch.strided or tensor._is_zerotensor():
            return None
        return self.storages.get(tensor.untyped_storage().data_ptr())

    def _forget(self, unit: ShardUnit) -> None:
        for flat in unit.flats:
            if flat.buffer is not None:
                self.storages.pop(flat.buffer.tensor.untyped_storage().data_ptr(), None)

    def _make_room(self) -> None:
        for unit in self._to_release():
            self.release(unit)

    def _to_release(self) -> list[ShardUnit]:
        """The units in whose place another may come."""
        reasons = [(unit, self.why(unit)) for unit in self._units.values()]
        near = [unit for unit, reason in reasons if reason is Reason.NEAR]
        others = sum(reason is Reason.USED for _, reason in reasons)
        return near[: max(0, len(near) + others + 1 - self.limit)]

    # -- pins -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no forward is running."""
        return len(self._forwards) == 1

    def forward_begins(self) -> None:
        """A forward starts inside the present one."""
        self._forwards.append([])

    def forward_ends(self) -> None:
        """The innermost forward is over: what it has pinned is needed no longer."""
        release_pins(self._forwards[-1])
        self._forwards.pop().clear()

    def pin(self, unit: ShardUnit) -> None:
        """Keep ``unit`` whole until the innermost forward is over."""
        unit.pins += 1
        self._forwards[-1].append(unit)

    def loop_pin(self, unit: ShardUnit) -> LoopPin:
        """Let the last pin of ``unit`` end earlier."""
        return LoopPin(unit, self._forwards[-1], self)


def _is_viewed(unit: ShardUnit) -> bool:
    """Whether somebody has views of what was whole, and not for a moment only.

    Garbage does until it is collected, as a frame that an exception has led to; a thread that looks where this one is,
    as the watchdog does, holds its frames for that long, with all that is in them: on this rank alone.
    """
    if not unit.is_viewed:
        return False
    for end in () if unit.was_seen else _ENDS:
        end()
        if not unit.is_viewed:
            return False
    unit.was_seen = True
    return True


def release_pins(units: Iterable[ShardUnit]) -> None:
    """One pin less for each."""
    for unit in units:
        unit.pins -= 1


@dataclass
class LoopPin:
    """Keeps a unit whole though nobody calls its module, for as long as it is ``among`` what a forward has pinned."""

    unit: ShardUnit
    among: list[ShardUnit]
    whole: WholeUnits

    @property
    def holds(self) -> bool:
        """Whether the unit is still pinned."""
        return self.unit in self.among

    def release(self) -> None:
        """Let go of the unit."""
        if self.holds:
            self.among.remove(self.unit)
            release_pins([self.unit])
            self.whole.leave(self.unit)
