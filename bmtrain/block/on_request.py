"""Whole units for who asks: code outside of a forward, operations on parameters of other modules, loops over lists."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..context import Context
from ..shard.unit import ShardUnit
from .compute import COMPUTE
from .frame import Frame
from .pins import Pins
from .residency import Residency
from .trace import Phase
from .turns import Turn


class OnRequest(ABC):
    """The part of the engine that makes units whole though no forward of their own module runs."""

    ctx: Context
    residency: Residency
    _pins: Pins
    _frames: list[Frame]
    _handed: weakref.WeakKeyDictionary[nn.Module, Turn]
    _near: weakref.WeakSet[ShardUnit]

    @property
    def idle(self) -> bool:
        """Whether no distributed module is running."""
        return self._pins.idle

    @abstractmethod
    def register(self, unit: ShardUnit) -> None:
        """Give ``unit`` its place in the order."""

    @abstractmethod
    def _start_run(self, unit: ShardUnit | None, grad: bool) -> None: ...

    @abstractmethod
    def _enter(self, unit: ShardUnit, phase: Phase, autocast: torch.dtype | None) -> None: ...

    def pin(self, unit: ShardUnit) -> None:
        """Make ``unit`` whole until ``unpin``.  Collective."""
        self.register(unit)
        if unit.moves:
            self.residency.need(unit)
        unit.pins += 1

    def unpin(self, unit: ShardUnit) -> None:
        """Undo one ``pin``."""
        unit.pins -= 1
        if not unit.pins and unit.moves:
            self.residency.drop(unit)

    def may_gather(self, func: Callable[..., Any]) -> bool:
        """Whether ``func`` on a sharded parameter is part of a forward that all ranks run."""
        return not self.idle or func in COMPUTE

    def is_near(self, units: list[ShardUnit]) -> bool:
        """Whether operations outside of any forward have used ``units``, and their values are still here."""
        return self.idle and all(unit in self._near and (unit.is_coming or unit.is_whole) for unit in units)

    def apart(self, value: Any) -> Any:
        """What an operation outside of any forward gives: a copy, if it is a view of whole values."""
        if isinstance(value, torch.Tensor) and self.residency.find(value.untyped_storage().data_ptr()) is not None:
            return value.clone()
        return value

    @contextmanager
    def on_demand(self, units: list[ShardUnit]) -> Iterator[None]:
        """Whole units for one operation and, as its result may be a view, for the rest of the enclosing forward."""
        if self.idle:
            with self._outside(units):
                yield
            return
        for unit in units:
            self._enter(unit, "forward", self.ctx.device.autocast())
            self._pins.add(unit)
            if self._frames:
                self._frames[-1].add(unit)
        yield

    @contextmanager
    def _outside(self, units: list[ShardUnit]) -> Iterator[None]:
        """Whole units for one operation that no module's forward runs: it is a forward of its own to autograd.

        They are hidden at once, so that the next operation comes here, too, and finds them near.
        """
        engine: Any = self
        frame, near = Frame(engine, None, None, recompute=False), self.is_near(units)
        if not near:
            self._start_run(units[0], torch.is_grad_enabled())
        for unit in units:
            if near:
                self.residency.need(unit, unit.compute)
            else:
                self._enter(unit, "forward", frame.autocast)
            unit.pins += 1
            if torch.is_grad_enabled():
                frame.add(unit)
        try:
            with frame.hooks():
                yield
        finally:
            for unit in units:
                unit.pins -= 1
                self.residency.hide(unit)
            self._near.update(units)

    def take(self, unit: ShardUnit) -> Turn | None:
        """Make ``unit`` whole for the rest of the running forward, or until the turn is closed; None if none runs."""
        if self.idle or not unit.moves:
            return None
        pinned = self._pins.innermost
        with self.on_demand([unit]):
            return Turn(unit, pinned, unit.uses() if self.ctx.device.is_cuda else None)

    def hand(self, holder: nn.Module, unit: ShardUnit) -> None:
        """Make ``unit`` whole until ``holder`` hands out another, or the running forward ends."""
        last = self._handed.get(holder)
        if last is None or not last.is_open or last.unit is not unit:
            if last is not None:
                last.close()
            turn = self.take(unit)
            if turn is not None:
                self._handed[holder] = turn
