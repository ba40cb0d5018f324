"""Whole units for who asks: code outside of a forward, operations on parameters of other modules, loops over lists."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..autograd import in_function_transform, outside_function_transforms
from ..shard.flat import place_of
from ..shard.parameter import ShardedParameter
from ..shard.unit import ShardUnit, State, unit_of_flat
from .backward import Backward
from .cast_functions import CAST_BY_AUTOCAST
from .frame import Frame
from .memory import MemoryPlan
from .schedule import Schedule
from .whole_units import LoopPin, release_pins

T = TypeVar("T")


class OutsideForward:
    """Makes units whole though no forward of their own module runs."""

    def __init__(self, schedule: Schedule, backward: Backward, plan: MemoryPlan) -> None:
        self._schedule, self._whole, self._backward, self._plan = schedule, schedule.whole, backward, plan
        self._device = schedule.ctx.device
        self._last: weakref.WeakKeyDictionary[nn.Module, LoopPin] = weakref.WeakKeyDictionary()
        self._near: weakref.WeakSet[ShardUnit] = weakref.WeakSet()
        self._held: list[ShardUnit] = []

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
            release_pins(held)
            for unit in held:
                if not unit.pins and unit.moves:
                    self._whole.let_go(unit)

    def all_pinned(self) -> list[ShardUnit]:
        """The units that somebody has pinned."""
        return [unit for unit in self._schedule.units.values() if unit.pins]

    def release(self, units: Iterable[ShardUnit]) -> None:
        """Give up whole values that no running forward has pinned."""
        for unit in units:
            if unit.moves and not unit.pins:
                self._whole.release(unit)

    def show_at_rest(self, unit: ShardUnit) -> None:
        """Show the parameters of ``unit``, which autocast has let be gathered cast, as they rest.  Collective.

        If a running forward needs them whole, they are gathered uncast from here on: its code would read or write them
        so each time.  A block that is to run again, and has given up what it saved, would not save the same: there they
        stay as they are.
        """
        if any(unit in frame.units and not frame.keep_saved() for frame in self._backward.frames):
            return
        if not self._schedule.ctx.diary.is_apart:
            self._schedule.trace.comes_to(f"the use of .data of parameters of {unit.name or 'the model'} in a forward")
        is_needed = bool(unit.pins)
        self._whole.release(unit)
        if is_needed:
            unit.never_cast()
            self._whole.gather(unit, unit.compute_dtype(None))

    # -- transforms of torch.func ------------------------------------------------------------------------------------

    def hold(self, units: Iterable[ShardUnit]) -> None:
        """Keep whole what a transform of torch.func computes with: nobody learns when it is through."""
        for unit in units:
            if unit not in self._held and unit.moves:
                unit.pins += 1
                self._held.append(unit)

    def let_go(self) -> None:
        """The transforms are over."""
        if self._held:
            held, self._held = self._held, []
            release_pins(held)
            for unit in held:
                self._whole.set_back(unit)

    # -- operations on parameters -----------------------------------------------------------------------------------

    def is_near(self, parameters: Iterable[ShardedParameter]) -> bool:
        """Whether operations outside of any forward have used ``parameters``, and their values are still here."""
        return self._whole.idle and self._all_near(_units(parameters))

    def _all_near(self, units: Iterable[ShardUnit]) -> bool:
        return all(unit in self._near and unit.state is not State.SHARDED for unit in units)

    def given(self, out: T, units: Sequence[ShardUnit]) -> T:
        """What a forward that used ``units`` gives, with copies in the place of views of their parameters.

        And in the place of contiguous views of others: whether a view or a copy is made of a parameter is up to the
        sizes that a rank sees: ``p.repeat(b, 1, 1)`` of a batch of one is often a view.
        """

        def is_left(value: object) -> bool:
            if not isinstance(value, torch.Tensor):
                return False
            flat = self._whole.flat_at(value)
            return flat is not None and (unit_of_flat(flat) in units or value.is_contiguous())

        leaves = [out] if isinstance(out, torch.Tensor) else tree_leaves(out)
        if any(map(is_left, leaves)):
            out = cast(T, tree_map(lambda value: self.apart(value) if is_left(value) else value, out))
        return out

    def apart(self, value: object) -> object:
        """What an operation outside of any forward gives: a copy, if it is a view of whole values."""
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter) or in_function_transform():
            return value  # what a transform computes with is held
        if self._whole.flat_at(value) is None:
            return value
        expanded = [size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)]
        if not any(expanded):
            return value.clone()
        once = value[tuple(slice(0, 1) if many else slice(None) for many in expanded)]
        return once.clone().expand(value.shape)

    @contextmanager
    def on_demand(
        self, parameters: Sequence[ShardedParameter], func: Callable[..., object] | None, what: str
    ) -> Iterator[None]:
        """Whole parameters for ``func`` (None: for what needs them as they rest), and for the rest of the enclosing
        forward, as its result may be a view.  Collective; ``what`` says so in errors.
        """
        units = _units(parameters)
        if self._whole.idle:
            casts = func in CAST_BY_AUTOCAST or (func and not any(place_of(p)[0].autocasts for p in parameters))
            with self._alone(units, self._device.autocast() if casts else None, what):
                yield
            return
        for unit in units:
            if in_function_transform():
                with outside_function_transforms():
                    self._use_in_forward(unit)
                self.hold([unit])
            else:
                self._use_in_forward(unit)
        yield

    def _use_in_forward(self, unit: ShardUnit) -> None:
        """Make ``unit`` whole until the running forward ends."""
        self._schedule.use(unit, "forward", self._device.autocast())
        self._whole.pin(unit)
        if self._backward.frames:
            self._backward.frames[-1].add(unit)

    @contextmanager
    def _alone(self, units: Sequence[ShardUnit], autocast: torch.dtype | None, what: str) -> Iterator[None]:
        """Whole units for one operation that no module's forward runs: it is a forward of its own to autograd.

        They are set back at once, so that the next operation comes here, too, and finds them near.  Near or not, it is
        noted: a rank that does it alone is found out.
        """
        if in_function_transform():
            with outside_function_transforms():
                self._gather(units, autocast, what)
            self.hold(units)
            release_pins(units)
            yield
            return
        frame = Frame(self._backward, None, None, recompute=False)
        frame.autocast = autocast
        self._gather(units, autocast, what)
        if torch.is_grad_enabled():
            for unit in units:
                frame.add(unit)
        try:
            with frame.hooks():
                yield
        finally:
            release_pins(units)
            for unit in units:
                self._whole.set_back(unit, looks=False)  # what comes out is copied
            self._near.update(units)

    def _gather(self, units: Sequence[ShardUnit], autocast: torch.dtype | None, what: str) -> None:
        """Make ``units`` whole and pin them."""
        if not self._all_near(units):
            if torch.is_grad_enabled():
                self._plan.run_starts(self._schedule.units)
            self._schedule.run_starts(units[0], torch.is_grad_enabled(), what)
        for unit in units:
            self._schedule.use(unit, "operation", autocast, what)
            unit.pins += 1

    # -- loops over lists -------------------------------------------------------------------------------------------

    def pin_for_loop(self, unit: ShardUnit) -> LoopPin | None:
        """Make ``unit`` whole until the pin is released or the running forward ends; None if none runs."""
        if self._whole.idle or not unit.moves:
            return None
        self._use_in_forward(unit)
        return self._whole.loop_pin(unit)

    def pin_until_next(self, holder: nn.Module, unit: ShardUnit) -> None:
        """Make ``unit`` whole until ``holder`` asks so for another, or the running forward ends."""
        last = self._last.get(holder)
        if last is None or not last.holds or last.unit is not unit:
            if last is not None:
                last.release()
            pin = self.pin_for_loop(unit)
            if pin is not None:
                self._last[holder] = pin


def _units(parameters: Iterable[ShardedParameter]) -> list[ShardUnit]:
    return list({id(unit): unit for unit in (unit_of_flat(place_of(p)[0]) for p in parameters)}.values())
