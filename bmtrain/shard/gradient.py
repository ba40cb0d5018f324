"""This rank's part of a reduced gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch

from .. import kernels
from ..comm import Communicator
from ..context import Context
from ..device import Event
from .arenas import Arena
from .layout import Layout
from .place import Part, Place
from .pools import Buffer, Pools
from .told import Told


class ShardGradient:
    """The gradient of one flat shard: (S,) elements.

    One reduction of low-precision gradients stays as it came: summing made it exact to that precision, and a wider
    copy would only cost memory.  From the second on (gradient accumulation) the sum is kept in fp32.

    Attributes:
        present: whether anything was reduced since ``clear``; the same on all ranks.
        touched: for each parameter, whether this rank contributed to it; ranks may differ (experts without tokens).
        told: what ranks have told each other of that since ``clear``, and where in it the first parameter is.
        dropped: parameters whose gradient user code has dropped since the last reduction.
        reached: parameters that the first backwards were about to give a gradient; None once that was compared.
        factor: a pending multiplier, 0-d on the device, that whoever reads ``values`` has to apply.
        reduce: what sums it over ranks.
        weight: another, on the host.  Ranks are summed, and the weight makes that a mean, at no cost.
    """

    def __init__(
        self, pools: Pools, layout: Layout, dtype: torch.dtype, reduced: Event, reduce: Communicator, divisor: int
    ) -> None:
        """``reduce`` sums over ranks, and ``divisor`` makes a mean of that, or whatever else it is to be."""
        self._pools, self._layout, self._dtype, self._reduced = pools, layout, dtype, reduced
        self.reduce, self._divisor = reduce, divisor
        self.present = False
        self.touched = [False] * len(layout.slots)
        self.told: tuple[Told, int] | None = None
        self.dropped: set[int] = set()
        self.reached: set[int] | None = set()
        self._shown: dict[int, weakref.ref[Part]] = {}  # what user code may hold: parts, or, on one rank, all
        self._shown_whole: dict[int, torch.Tensor] = {}
        self.factor: torch.Tensor | None = None
        self.weight = 1.0
        self._arena: Arena | None = None  # one reduction, in the dtype that travelled
        self._room: Buffer | None = None  # the same on one rank, where whole gradients are written into it
        self._is_lent = False  # whether that is going on
        self._sum: torch.Tensor | None = None  # fp32
        self._wide = False  # whether the gradient is in _sum

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which gradients are summed."""
        return torch.float32 if self._dtype in (torch.float16, torch.bfloat16) else self._dtype

    @property
    def device(self) -> torch.device:
        """Where the gradient is."""
        assert self._came is not None
        return self._came.device

    def receive(self, whole: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Where this rank's part of the ranks' sum of ``whole`` goes, and what to do once it is there."""
        weight = 1.0 / self._divisor
        self._changes()
        if not self.present:
            self.present, self._wide, self.factor, self.weight = True, False, None, weight
            return self._fitting(whole.dtype), None
        total, share = self._total(), weight / self.weight  # 1, unless somebody has settled what is there
        if self._came is not None and self._came is not total and self._came.dtype == whole.dtype:
            came = self._came

            def add() -> None:
                if share == 1.0:
                    kernels.accumulate_(total, came, first=False)
                else:
                    total.add_(came, alpha=share)

            return came, add
        part = self._pools.acquire_part(self, self._layout, whole.dtype)

        def add_part() -> None:
            total.add_(part.tensor, alpha=share)
            self._pools.parts.give_back(part, self._pools.ctx.device.reduce_stream)

        return part.tensor, add_part

    def add_elsewhere(self) -> None:
        """The ranks of another stage of a pipeline, which keep all of it, have added to it."""
        self._changes()
        if not self.present:
            self._fitting(self._dtype)
            self.present, self._wide, self.factor, self.weight = True, False, None, 1.0 / self._divisor

    def room(self, dtype: torch.dtype) -> Buffer:
        """On one rank: where whole gradients may be written, for ``add_written``; uninitialised but for zeros in gaps.

        It is what ``add_written`` keeps, unless there is a gradient already.  As in torch, its memory goes when the
        gradient is cleared.
        """
        if self.present or self._is_lent:
            room = self._pools.make_grads(self._layout, dtype)
        else:
            self._is_lent = True
            if self._room is None or self._room.tensor.dtype != dtype:
                self._room = self._pools.make_grads(self._layout, dtype)
            room = self._room
            room.allocate()
        if self._layout.gaps:
            torch._foreach_zero_([room.tensor[start:end] for start, end in self._layout.gaps])
        return room

    def add_written(self, room: Buffer) -> None:
        """On one rank: add what was written into ``room``."""
        self.dropped.clear()
        weight = 1.0 / self._divisor
        if room is self._room:
            self._is_lent = False
        if not self.present:
            assert room is self._room
            self._arena = room.arena
            self.present, self._wide, self.factor, self.weight = True, False, None, weight
            return
        total, share = self._total(), weight / self.weight
        if share == 1.0 and total.dtype == torch.float32:
            kernels.accumulate_(total, room.tensor, first=False)
        else:
            total.add_(room.tensor, alpha=share)

    def values(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient, in whatever precision it is kept, and the factor to apply beside ``weight``.

        For the current stream.
        """
        assert self.present
        self._reduced.wait(self._pools.ctx.device.current_stream())
        tensor = self._sum if self._wide else self._came
        assert tensor is not None
        if self._shown_whole:
            self._take_assigned(tensor)
        return tensor, self.factor

    def settled(self) -> torch.Tensor:
        """The gradient in the dtype of sums, with every factor applied.  For the current stream."""
        self.values()
        total = self._total()
        if self.weight != 1.0:
            total.mul_(self.weight)
            self.weight = 1.0
        return total

    def scale_(self, factor: torch.Tensor) -> None:
        """Multiply by ``factor``, 0-d float32 on the device, when it is next read."""
        self.note_write()
        self.factor = factor if self.factor is None else self.factor * factor

    def set(self, index: int, part: torch.Tensor | None) -> None:
        """Replace this rank's part of one parameter's gradient, or drop it."""
        self._leave(index)
        self.note_write()
        place = self._layout.local(index, self._pools.ctx.shard_rank).shard
        if part is not None:
            self._zeros()[place].copy_(part)
            self.dropped.discard(index)
        elif self.present:
            self.settled()[place].zero_()
            self.dropped.add(index)
            if len(self.dropped) == len(self.touched):
                self.clear()  # also what a factor that is not finite has made of the gaps
        self.touched[index] = part is not None

    def is_used(self, index: int) -> bool:
        """Whether any rank has a gradient for one parameter.

        Not collective, though it may wait until the other ranks' hosts are through with the last backward.
        """
        if self.touched[index]:
            return self.present
        if not self.present or self.told is None or index in self.dropped:
            return False
        told, first = self.told
        return told.is_used(first + index)

    @property
    def is_all_used(self) -> bool:
        """Whether ranks have told each other that some rank has a gradient for each parameter.

        The same on all ranks; waits as ``is_used`` does.
        """
        return self.told is not None and self.told[0].are_used(self.told[1], len(self.touched))

    def used(self) -> list[bool]:
        """The same of all parameters."""
        if self.present and all(self.touched):
            return list(self.touched)
        return [self.is_used(index) for index in range(len(self.touched))]

    def part(self, index: int, place: Place) -> Part:
        """This rank's part of one parameter's gradient, as user code holds it.  Nothing is read yet."""
        known = self._shown.get(index)
        part = None if known is None else known()
        if part is None:
            part = Part(place, home=_OfGradient(self, index, place))
            self._shown[index] = weakref.ref(part)
        return part

    def read_part(self, index: int) -> torch.Tensor:
        """(n,) the same, in the dtype of sums.  For the current stream."""
        return self.settled()[self._layout.local(index, self._pools.ctx.shard_rank).shard]

    def whole(self, index: int) -> torch.Tensor:
        """On one rank: one parameter's gradient, the same tensor each time, so that its ``.data`` may be assigned."""
        total, shown = self.settled(), self._shown_whole.get(index)
        if shown is None:
            slot = self._layout.slots[index]
            shown = self._shown_whole[index] = total[slot.start : slot.end].view(slot.shape).data  # can be detached
        return shown

    def _take_assigned(self, total: torch.Tensor) -> None:
        """Keep what was assigned to the ``.data`` of what ``whole`` gave."""
        start, size = total.data_ptr(), total.element_size()
        for index, shown in self._shown_whole.items():
            slot = self._layout.slots[index]
            if shown.numel() and shown.data_ptr() != start + slot.start * size:
                place = total[slot.start : slot.end].view(slot.shape)
                place.copy_(shown)
                shown.data = place

    def _leave(self, index: int) -> None:
        """Whoever holds this gradient keeps its values."""
        known = self._shown.pop(index, None)
        part = None if known is None else known()
        if part is not None:
            part.leave_home()
        if index in self._shown_whole:
            whole = weakref.ref(self._shown_whole.pop(index))
            held = whole()
            if held is not None:
                held.data = held.clone()

    def clear(self) -> None:
        """Forget the gradient; its memory stays for the next one."""
        for index in [*self._shown, *self._shown_whole]:
            self._leave(index)
        self._changes()
        self.told = None
        self.present, self.factor = False, None
        self.touched = [False] * len(self.touched)
        if self._room is not None:
            self._arena, self._sum, self._is_lent = None, None, False
            if not self._room.give_up_memory():
                self._room = None

    def note_write(self) -> None:
        """Its values are about to change."""
        self._pools.outer.whole_gradients.forget()

    def _changes(self) -> None:
        """More is added: to what was dropped, too, of which nothing is known then."""
        if self.dropped:
            self.dropped.clear()
            self.told = None
        self.note_write()

    def _zeros(self) -> torch.Tensor:
        """Become a gradient of zeros, to be written."""
        if not self.present:
            self._fitting(self._dtype).zero_()
            self.present, self._wide, self.factor, self.weight = True, False, None, 1.0
        return self.settled()

    @property
    def _came(self) -> torch.Tensor | None:
        return None if self._arena is None else self._arena.tensor

    def _fitting(self, dtype: torch.dtype) -> torch.Tensor:
        """The buffer of one reduction, in this dtype."""
        if self._pools.ctx.world_size == 1:
            room = self.room(dtype)
            if room is self._room:
                self._is_lent = False
            self._arena = room.arena
            return room.tensor
        if self._arena is None or self._arena.tensor.dtype != dtype:
            self._arena = self._pools.alloc_part(self._pools.collectives.reduce, self._layout, dtype)
        return self._arena.tensor

    def _total(self) -> torch.Tensor:
        """The gradient in the dtype of sums, with ``factor`` applied but not ``weight``."""
        assert self._came is not None
        total = self._came
        if self._wide or total.dtype != self.dtype:
            if self._sum is None:
                self._sum = torch.empty(total.numel(), dtype=self.dtype, device=total.device)
            if not self._wide:
                self._sum.copy_(self._came)
            total, self._wide = self._sum, True
        if self.factor is not None:
            total.mul_(self.factor)
            self._pools.ctx.device.keep_for_current_stream(self.factor)  # made on another one
            self.factor = None
        return total


def add_all(gradients: Sequence[ShardGradient], wholes: Sequence[torch.Tensor]) -> None:
    """Reduce each whole one over ranks, and add this rank's part to its gradient.  Collective; on the current stream.

    Where one communicator reduces all of them, that is one operation of the device.
    """
    parts = [gradient.receive(whole) for gradient, whole in zip(gradients, wholes, strict=True)]
    groups = {id(gradient.reduce): gradient.reduce for gradient in gradients}
    with next(iter(groups.values())).group() if len(groups) == 1 else nullcontext():
        for gradient, whole, (part, _) in zip(gradients, wholes, parts, strict=True):
            gradient.reduce.reduce_scatter(whole, part)
    for _, then in parts:
        if then is not None:
            then()


def tell(ctx: Context, gradients: Sequence[ShardGradient], steps: int) -> Told:
    """Let ranks tell each other which parameters have ``gradients``, after so many optimizer ``steps``.

    All ranks call it alike.  Nobody waits for it who does not ask.
    """
    told, first = Told(ctx, [touched for one in gradients for touched in one.touched], steps), 0
    for one in gradients:
        one.told = told, first
        first += len(one.touched)
    return told


class _OfGradient:
    """Where one parameter's gradient is."""

    is_gradient: ClassVar[bool] = True

    def __init__(self, gradient: ShardGradient, index: int, place: Place) -> None:
        self._gradient, self._index, self.place = gradient, index, place

    @property
    def dtype(self) -> torch.dtype:
        """In which gradients are summed."""
        return self._gradient.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._gradient.device

    def read(self) -> torch.Tensor:
        """(n,) the present values, not to be written."""
        return self._gradient.read_part(self._index)

    @contextmanager
    def writing(self) -> Iterator[torch.Tensor]:
        """(n,) the present values, which the body may change in place."""
        self._gradient.note_write()
        yield self.read()
