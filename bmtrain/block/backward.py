"""What a backward does to units: gathers them again, runs blocks again, and reduces gradients as it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch.autograd.graph import Node

from ..autograd import ScriptsAsWritten, backward_id, running_node, runs_as_written, saves_with, when_backward_ends
from ..device import Device
from ..shard.gradient import tell
from ..shard.told import Told
from ..shard.unit import ShardUnit, unit_of_flat, wait_to_be_reduced
from .frame import Frame
from .of_no_module import OfNoModule
from .saved import KeptValues, Place
from .schedule import Schedule
from .untrained import FirstGraphs
from .whole_units import release_pins


class Watch(Protocol):
    """Looks at whole backwards."""

    def backward_begins(self) -> None:
        """One is running."""

    def backward_ends(self) -> None:
        """It is over, on all ranks."""


class Backward:
    """The forwards that autograd may come back to.

    Attributes:
        frames: those that are running now, the innermost last.
        kept: what stays for the forward that is running; None unless everything does.
        recomputes: how many blocks are being run again, one inside the other.
        peeks: whether somebody looks at what was saved, before a backward needs it.
        watch: who is told of the first backwards; None once that is over.
        steps: how many optimizer steps this rank has begun.
    """

    def __init__(self, schedule: Schedule, of_no_module: OfNoModule) -> None:
        self._schedule, self._whole, self._of_no_module = schedule, schedule.whole, of_no_module
        self.flat_at, self.whole_storages = schedule.whole.flat_at, schedule.whole.storages
        self.holds = schedule.pools.holds
        self.frames: list[Frame] = []
        self.kept: KeptValues | None = None
        self.recomputes = 0
        self.peeks = False
        self.watch: Watch | None = None
        self.first_graphs = FirstGraphs()
        self.steps = 0
        self._told: Told | None = None
        self._begun: list[Frame] = []
        self._scripts: ScriptsAsWritten | None = None  # while blocks are to run again
        self._id: int | None = None
        self._note: Callable[[torch.Tensor], object] | None = None
        self._given: dict[int, tuple[Node, list[ShardUnit]]] = {}  # by backward: what its running node computes with

    @property
    def device(self) -> Device:
        """Where whole values are."""
        return self._schedule.ctx.device

    def will_repeat(self) -> None:
        """A block that begins now is to run again: until the backward is over no script may come to be optimized."""
        if self._scripts is None:
            self._scripts = ScriptsAsWritten()
            self._scripts.__enter__()

    @runs_as_written
    def output_is_reached(self, _: torch.Tensor) -> None:
        """Hook of what an outermost forward returned."""
        self._starts()
        self.first_graphs.walk()

    def _starts(self) -> None:
        present = backward_id()
        if present != self._id:
            self._id = present
            when_backward_ends(partial(self._ends, present))
            if self.watch is not None:
                self.watch.backward_begins()

    def reached(self, frame: Frame) -> None:
        """The backward needs something that ``frame`` saved.

        Autograd runs nodes in the reverse order of their making, so every frame that began before and does not
        enclose this one is through: its units' gradients are complete.
        """
        self._starts()
        self._another_node()
        frame.begun = True
        enclosing: set[Frame] = set()
        outer = frame.parent
        while outer is not None:
            enclosing.add(outer)
            outer = outer.parent
        for done in self._begun:
            if not done.finished and done not in enclosing:
                self._finish(done)
        self._begun.append(frame)
        if frame.units and not self.recomputes:
            around = [unit for outer in enclosing if outer.parent is not None for unit in outer.units]
            self._schedule.use(frame.units[0], "backward", frame.autocast, around=around)

    def enters_stage(self, frame: Frame, units: Sequence[ShardUnit]) -> None:
        """The backward comes to the results of a pipeline, which ran in ``frame``.

        From here to ``leaves_stage`` this rank does what its stage needs and other stages do not, so that whatever all
        ranks do together must be done before.
        """
        if not frame.begun:
            self.reached(frame)
        for unit in units:
            self._schedule.leave_to_stage(unit)
        self._schedule.ctx.diary.is_apart = True

    def leaves_stage(self, frame: Frame, units: Sequence[ShardUnit]) -> None:
        """All its blocks are through.  ``units`` are those of all stages."""
        for done in self._begun:
            if not done.finished and _is_within(done, frame):
                self._finish(done)
        for unit in units:
            if unit.pools.is_here and unit.open_uses:  # a use that saved nothing for the backward was not reached
                self._schedule.reduce(unit)
        self._schedule.ctx.diary.is_apart = False
        for unit in units:
            if not unit.pools.is_here:
                self._schedule.reduced_elsewhere(unit)

    def _finish(self, frame: Frame) -> None:
        frame.finished = True
        for unit in frame.units:
            unit.open_uses -= 1
            if unit.open_uses <= 0:
                self._schedule.reduce(unit)

    def rebuild(self, place: Place, autocast: torch.dtype | None) -> torch.Tensor:
        """A view of the re-gathered buffer."""
        flat = place.flat
        if flat.steps != place.since:
            flat.require_unchanged(place.numbers, place.since)
        self._another_node()
        if flat.buffer is None:
            self._schedule.use_again(unit_of_flat(flat), autocast)
        assert flat.buffer is not None
        self._hold(unit_of_flat(flat))
        return place.within(flat.buffer)

    def _hold(self, unit: ShardUnit) -> None:
        """Keep ``unit`` whole until the running node has computed: it may need more, for which others are gathered."""
        present = backward_id()
        if present is not None:
            units = self._given.setdefault(present, (running_node(), []))[1]
            if unit not in units:
                unit.pins += 1
                units.append(unit)

    def _another_node(self) -> None:
        """If another node of this backward is running, let go of what the last one has computed with."""
        present = backward_id()
        if present in self._given and self._given[present][0] is not running_node():
            self._let_go_of(present)

    def let_go(self) -> None:
        """No backward is running, whether the last one has ended or raised."""
        for backward in list(self._given):
            self._let_go_of(backward)

    def _let_go_of(self, backward: int) -> None:
        release_pins(self._given.pop(backward)[1])

    @contextmanager
    def recomputing(self, frame: Frame, note: Callable[[torch.Tensor], object]) -> Iterator[None]:
        """Around the second run of a block's forward; ``note`` is told of every tensor it would save."""
        saved, self.frames = self.frames, [frame]
        outer_note, self._note = self._note, note
        self.recomputes += 1
        self._whole.forward_begins()
        try:
            if frame.units:
                self._schedule.use_all(frame.units[0], "backward", frame.autocast)
            yield
        finally:
            self.frames, self._note = saved, outer_note
            self.recomputes -= 1
            self._whole.forward_ends()

    @property
    def note(self) -> Callable[[torch.Tensor], object] | None:
        """While a block runs a second time: what to call with each tensor that would be saved, instead of saving it.

        None when somebody else's hooks (a checkpoint inside the block) would get those tensors.
        """
        return self._note if self._note is not None and saves_with(self._note) else None

    @runs_as_written
    def _ends(self, ended: int | None) -> None:
        if ended in self._given:
            self._let_go_of(ended)
        self.finish()
        self._of_no_module.backward_ends()
        if self.watch is not None:
            self.watch.backward_ends()

    @runs_as_written
    def finish(self) -> None:
        """Reduce every gradient not reduced yet, in the units' order, and release what is whole.  Collective."""
        self._id = None
        self._schedule.ctx.diary.is_apart = False
        used = {unit.index for frame in self._begun if not frame.finished for unit in frame.units}
        for frame in self._begun:
            frame.begun = frame.finished = False
        self._begun = []
        # A GPU's backward ends in a thread of autograd's: then whoever asks for the gradients comes here once more.
        if self._scripts is not None and self._scripts.is_of_this_thread:
            self._scripts.__exit__()
            self._scripts = None
        self._schedule.register_copies()
        units = self._schedule.units
        present = [unit for unit in map(units.get, sorted(units.keys())) if unit is not None]
        for unit in present:
            unit.open_uses = 0
        if used or wait_to_be_reduced(present):
            for unit in present:
                if unit.index in used or unit.has_raw_grads():
                    self._schedule.reduce(unit)
        if self._whole.idle:
            self.kept = None
            self._whole.let_go_of_all()
        self._tell()
        self._schedule.pools.tidy()

    def _tell(self) -> None:
        """Let ranks tell each other what has got a gradient, for whoever asks of them alone whether there is one."""
        reduced, self._schedule.reduced = self._schedule.reduced, []
        if not reduced or self._schedule.ctx.world_size == 1:
            return
        if self._told is not None:  # long there: it was begun when a backward before this one ended
            self._told.require_same_steps()
        units = sorted(set(reduced), key=lambda unit: unit.index)  # pipelines reduce in an order of each stage's own
        gradients = [flat.gradient for unit in units for flat in unit.flats if flat.gradient.present]
        news = [gradient for gradient in gradients if not gradient.is_all_used]  # as all ranks know
        if news:
            self._told = tell(self._schedule.ctx, news, self.steps)


def _is_within(frame: Frame, outer: Frame) -> bool:
    parent = frame.parent
    while parent is not None and parent is not outer:
        parent = parent.parent
    return parent is outer
