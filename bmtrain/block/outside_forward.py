"""Whole units for who asks: code outside of a forward, operations on parameters of other modules, loops over lists."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..shard.unit import ShardUnit, State
from .backward import Backward
from .forward_functions import FORWARD_FUNCTIONS
from .frame import Frame
from .memory import RecomputePlan
from .schedule import Schedule
from .whole_units import LoopPin, unpin


class OutsideForward:
    """Makes units whole though no forward of their own module runs."""

    def __init__(self, schedule: Schedule, backward: Backward, plan: RecomputePlan) -> None:
        self._schedule, self._whole, self._backward, self._plan = schedule, schedule.whole, backward, plan
        self._device = schedule.ctx.device
        self._last: weakref.WeakKeyDictionary[nn.Module, LoopPin] = weakref.WeakKeyDictionary()
        self._near: weakref.WeakSet[ShardUnit] = weakref.WeakSet()

    def forward_starts(self) -> None:
        """An outermost forward begins: what operations outside have left whole is not near any more."""
        self._near.clear()

    @contextmanager
    def pinned(self, units: Iterable[ShardUnit]) -> Iterator[None]:
        """Whole units inside the ``with``, outside of any forward or in one.  Collective."""
        held: list[ShardUnit] = []
        try:
            for unit in units:
                self._schedule.register(unit)
                if unit.moves:
                    self._whole.gather(unit)
                unit.pins += 1
                held.append(unit)
            yield
        finally:
            unpin(held)
            for unit in held:
                if not unit.pins and unit.moves:
                    self._whole.release(unit)

    # -- operations on parameters -----------------------------------------------------------------------------------

    def may_gather(self, func: Callable[..., object]) -> bool:
        """Whether ``func`` on a sharded parameter is part of a forward that all ranks run."""
        return not self._whole.idle or func in FORWARD_FUNCTIONS

    def is_near(self, units: Sequence[ShardUnit]) -> bool:
        """Whether operations outside of any forward have used ``units``, and their values are still here."""
        return self._whole.idle and all(unit in self._near and unit.state is not State.SHARDED for unit in units)

    def apart(self, value: object) -> object:
        """What an operation outside of any forward gives: a copy, if it is a view of whole values."""
        if isinstance(value, torch.Tensor) and self._whole.flat_at(value) is not None:
            return value.clone()
        return value

    @contextmanager
    def on_demand(self, units: Sequence[ShardUnit]) -> Iterator[None]:
        """Whole units for one operation and, as its result may be a view, for the rest of the enclosing forward."""
        if self._whole.idle:
            with self._alone(units):
                yield
            return
        frames = self._backward.frames
        for unit in units:
            self._schedule.use(unit, "forward", self._device.autocast())
            self._whole.pin(unit)
            if frames:
                frames[-1].add(unit)
        yield

    @contextmanager
    def _alone(self, units: Sequence[ShardUnit]) -> Iterator[None]:
        """Whole units for one operation that no module's forward runs: it is a forward of its own to autograd.

        They are set back at once, so that the next operation comes here, too, and finds them near.
        """
        grad = torch.is_grad_enabled()
        frame, near = Frame(self._backward, None, None, recompute=False), self.is_near(units)
        if not near:
            if grad:
                self._plan.run_starts()
            self._schedule.run_starts(units[0], grad)
        for unit in units:
            if near:
                self._whole.gather(unit, unit.compute)
            else:
                self._schedule.use(unit, "forward", frame.autocast)
            unit.pins += 1
            if grad:
                frame.add(unit)
        try:
            with frame.hooks():
                yield
        finally:
            unpin(units)
            for unit in units:
                self._whole.set_back(unit)
            self._near.update(units)

    # -- loops over lists -------------------------------------------------------------------------------------------

    def pin_for_loop(self, unit: ShardUnit) -> LoopPin | None:
        """Make ``unit`` whole until the pin is released or the running forward ends; None if none runs."""
        if self._whole.idle or not unit.moves:
            return None
        with self.on_demand([unit]):
            return self._whole.loop_pin(unit, unit.uses() if self._device.reuses_memory else None)

    def pin_until_next(self, holder: nn.Module, unit: ShardUnit) -> None:
        """Make ``unit`` whole until ``holder`` asks so for another, or the running forward ends."""
        last = self._last.get(holder)
        if last is None or not last.holds or last.unit is not unit:
            if last is not None:
                last.release()
            pin = self.pin_for_loop(unit)
            if pin is not None:
                self._last[holder] = pin
