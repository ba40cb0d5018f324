"""In which order units are used: gathered when they are needed, the predicted one ahead of its time."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from datetime import timedelta

import torch

from ..context import Context
from ..errors import ConfigurationError, UnsupportedError
from ..shard.freeze import keep_frozen_apart
from ..shard.pools import Pools
from ..shard.unit import ShardUnit, State
from .trace import Phase, Trace
from .whole_units import WholeUnits


class Schedule:
    """All units of this process, and the collectives that they need, in an order that is the same on all ranks.

    Attributes:
        units: those that there are still, by their place in the order.
        registered: how many there have been.
        reduced: those whose gradients were summed since ranks last told each other which parameters have one.
    """

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.pools = Pools(ctx)
        self.whole = WholeUnits()
        # With a watchdog nobody is waited for who differs or is gone, so that slowness alone may take its time.
        self.trace = Trace(ctx, ctx.timeout if ctx.watchdog is not None else min(ctx.timeout, timedelta(minutes=5)))
        self.units: weakref.WeakValueDictionary[int, ShardUnit] = weakref.WeakValueDictionary()
        self.registered = 0
        self._last: tuple[weakref.ref[ShardUnit], Phase] | None = None  # the use before this one, in this run
        self.reduced: list[ShardUnit] = []

    def register(self, unit: ShardUnit) -> None:
        """Give ``unit`` its place in the order; the same on all ranks, since all use units in the same order."""
        if unit.index < 0:
            unit.index = self.registered
            self.registered += 1
            self.units[unit.index] = unit

    def register_copies(self) -> None:
        """Where nothing is gathered, code may use copied units without our noticing."""
        copies, self.pools.copies = self.pools.copies, []
        for reference in copies:
            unit = reference()
            if isinstance(unit, ShardUnit) and not unit.moves:
                self.register(unit)

    def run_starts(self, unit: ShardUnit, grad: bool, operation: str = "") -> None:
        """An outermost forward begins, of ``unit``'s module; or, outside of any, an ``operation``."""
        if not operation:
            self.pools.whole_gradients.forget()
        if self.pools.moves:
            self.register(unit)
            self._last = None
            phase: Phase = "operation" if operation else "forward"
            self.trace.begin((phase, unit.index, grad), operation or f"the start of the forward of {unit.name}")

    def use(
        self,
        unit: ShardUnit,
        phase: Phase,
        autocast: torch.dtype | None,
        operation: str = "",
        around: Collection[ShardUnit] = (),
    ) -> None:
        """Make ``unit`` whole now, and prefetch what usually follows.  Collective.

        The backward comes back to the units ``around`` it, once for each time that the forward came here: not equally
        often on all ranks.  They stay.
        """
        self.register(unit)
        predicted = None
        if self.ctx.diary.is_apart:
            _require_in_stage(unit)
        elif unit.moves:
            again = self._is_here(unit, phase, autocast)
            trace = self.trace
            predicted = (
                trace.note_again(unit.index, phase) if again else trace.note(unit.index, phase, operation or unit.name)
            )
            self._note_next(unit, phase)
        if not unit.is_settled and not unit.pins and torch.is_grad_enabled():
            self.whole.release(unit)
            keep_frozen_apart(unit)
        if not unit.moves:
            return
        compute = unit.compute_dtype(autocast)
        if phase == "backward":
            unit.trains_in = compute
        self.ctx.diary.phase = phase
        self.whole.gather(unit, compute)
        following = next((other for other in unit.next_units.get(phase, ()) if other.index == predicted), None)
        if following is not None and not self.whole.is_in_place_of(following, around):
            self.whole.prefetch(following, following.compute_dtype(autocast))

    def _note_next(self, unit: ShardUnit, phase: Phase) -> None:
        """``unit`` comes after the one that was used last, in a forward or backward."""
        if self._last is not None:
            before, how = self._last[0](), self._last[1]
            if before is not None and how != "operation":
                known = before.next_units.get(how, ())[-1:]
                if known != (unit,):
                    before.next_units[how] = (*known, unit)
        self._last = weakref.ref(unit), phase

    def use_again(self, unit: ShardUnit, autocast: torch.dtype | None) -> None:
        """The backward needs values of ``unit`` that its forward has saved.  Collective, unless it stays.

        Of what stays a rank may have saved the values themselves (``KeptValues``), and not come here.
        """
        if unit.is_kept and unit.state is State.GATHERING and unit.fits(unit.compute_dtype(autocast)):
            self.whole.gather(unit, unit.compute)
        else:
            self.use(unit, "backward", autocast)

    def _is_here(self, unit: ShardUnit, phase: Phase, autocast: torch.dtype | None) -> bool:
        """Whether ``unit`` was used so in this run and is whole since: nothing is exchanged, however often it is used.

        A decoder that makes a sequence token by token runs as often as the longest sequence of a rank's batch asks for.
        """
        if not (unit.is_whole or unit.is_set_back) or unit.is_whole_apart or not self.trace.has(unit.index, phase):
            return False
        return unit.fits(unit.compute_dtype(autocast))

    def prepare_stages(self, units: Sequence[ShardUnit]) -> None:
        """Blocks of a pipeline, of all its stages, are to run.  Collective."""
        for unit in units:
            self.register(unit)
            self.leave_to_stage(unit)
            if not unit.is_settled and not unit.pins and torch.is_grad_enabled():
                self.whole.release(unit)
                keep_frozen_apart(unit)

    def leave_to_stage(self, unit: ShardUnit) -> None:
        """Give up what all ranks have gathered of a stage's unit: from here on its ranks do as they need."""
        if not unit.pins and not unit.is_whole_apart:
            self.whole.release(unit)

    def prefetch_stage(self, units: Sequence[ShardUnit], autocast: torch.dtype | None) -> None:
        """Gather what is this rank's stage's, first units first.  Collective in the stage."""
        for unit in units:
            if unit.pools.is_here:
                self.whole.prefetch(unit, unit.compute_dtype(autocast))

    def use_all(self, unit: ShardUnit, phase: Phase, autocast: torch.dtype | None) -> None:
        """Make ``unit`` whole, and what it shares with others, until the innermost forward is over."""
        for other in unit.borrows:
            if not (other.is_whole and other.pins):
                self.use(other, phase, autocast)
            self.whole.pin(other)
        if not (unit.is_whole and phase == "backward"):
            self.use(unit, phase, autocast)
        self.whole.pin(unit)

    def reduce(self, unit: ShardUnit) -> None:
        """Sum the gradients of ``unit`` over ranks.  Collective."""
        if unit.pools.is_here:
            unit.reduce_grads()
            self.reduced.append(unit)
        elif unit.has_raw_grads():
            raise UnsupportedError(
                f"Parameters of {unit.name}, a block of a pipeline, got a gradient from outside of it, as from a "
                "penalty on all parameters in the loss: only the ranks of its stage could sum it. Leave them out of "
                "the loss, or write to their .data under torch.no_grad(), as weight decay does."
            )

    def reduced_elsewhere(self, unit: ShardUnit) -> None:
        """The ranks of another stage have done so."""
        unit.reduced_elsewhere()
        self.reduced.append(unit)

    def updated(self, units: Sequence[ShardUnit]) -> None:
        """``units`` have new values: gather meanwhile those that stay whole, or with which the next step begins."""
        self.pools.whole_gradients.forget()
        opening = self.trace.opening() if self.ctx.device.overlaps else ()
        wanted: list[tuple[ShardUnit, torch.dtype | None]] = []
        for unit in units:
            if self.whole.idle and (unit.stays or unit.index in opening):
                wanted.append((unit, unit.trains_in if unit.stays else unit.compute))
            else:
                unit.release_prefetched()
        self.whole.gather_anew(wanted)


def _require_in_stage(unit: ShardUnit) -> None:
    if unit.stage is None:
        raise ConfigurationError(
            f"A block of a pipeline needs parameters of {unit.name or 'the model'}, which is outside of it, while the "
            "other stages do something else. Use them outside of the pipeline, and give blocks what comes out."
        )
