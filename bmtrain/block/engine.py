"""When parameters are whole and when gradients are reduced: the one place that decides."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..context import Context, engine_factory
from ..errors import CommunicationError
from ..shard.flat import FlatShard
from ..shard.freeze import keep_frozen_apart
from ..shard.unit import Pools, ShardUnit
from .frame import Frame, PlaceInFlat
from .memory import RecomputePlan
from .on_request import OnRequest
from .pins import Pins
from .residency import Residency
from .trace import Phase, Trace
from .turns import Turn
from .untrained import FirstGraphs

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@engine_factory
class Engine(OnRequest):
    """Gathers along the observed order, reduces as the backward passes, and gathers on demand what was not foreseen."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.pools = Pools(ctx)
        self.residency = Residency()
        self.plan = RecomputePlan(ctx)
        self.trace = Trace(ctx, min(ctx.timeout, timedelta(minutes=5)))
        self.units: weakref.WeakValueDictionary[int, ShardUnit] = weakref.WeakValueDictionary()
        self._next_index = 0
        self._frames: list[Frame] = []
        self._pins = Pins()
        self._handed: weakref.WeakKeyDictionary[nn.Module, Turn] = weakref.WeakKeyDictionary()
        self._near: weakref.WeakSet[ShardUnit] = weakref.WeakSet()
        self._recomputing = 0
        self._begun: list[Frame] = []
        self._task = -1
        self._first_graphs = FirstGraphs()
        self._note: Callable[[torch.Tensor], Any] | None = None

    # -- sharding -------------------------------------------------------------------------------------------------

    def shard(self, module: nn.Module) -> None:
        """Shard every parameter of ``module`` that is not sharded yet."""
        from .assign import shard_module

        self.pools.arenas.collect()
        self.pools.arenas.watch(module)
        shard_module(self, module)
        self._first_graphs = FirstGraphs()

    def collect(self) -> None:
        """Give back the memory of models that are gone.  Collective."""
        self.pools.arenas.collect()

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(
        self, unit: ShardUnit | None, recompute: bool | None, call: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """Run one module's forward with its unit whole."""
        grad = torch.is_grad_enabled()
        outermost = self.idle
        if outermost and torch._C._current_graph_task_id() == -1:  # -1: no backward is running
            self._near.clear()
            self._start_run(unit, grad)
        self._pins.begin()
        try:
            if unit is not None:
                self._enter_all(unit, "backward" if self._recomputing else "forward", self.ctx.device.autocast())
            out = self._framed(unit, recompute, call, args, kwargs) if grad else call(*args, **kwargs)
        finally:
            self._pins.end()
        if outermost:
            self._end_run(out, grad)
        return out

    def _framed(
        self, unit: ShardUnit | None, recompute: bool | None, call: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        parent = self._frames[-1] if self._frames else None
        if parent is not None and parent.recompute:
            # The enclosing block runs again as one piece and takes this one along.
            for used in (unit, *unit.borrows) if unit is not None else ():
                parent.add(used)
            return call(*args, **kwargs)
        choice = recompute
        if recompute is None:
            recompute = unit is not None and self.plan.recomputes(unit, args, kwargs)
        if not self.pools.moves and not recompute:
            return call(*args, **kwargs)
        measured = self.plan if unit is not None and choice is None and self.plan.measuring else None
        frame = Frame(self, unit, parent, recompute, measured)
        for other in unit.borrows if unit is not None else ():
            frame.add(other)
        self._frames.append(frame)
        try:
            return frame.run(call, args, kwargs)
        finally:
            self._frames.pop()

    def _start_run(self, unit: ShardUnit | None, grad: bool) -> None:
        if grad:
            self.plan.run_starts()
        if unit is not None and self.pools.moves:
            self.register(unit)
            self.trace.begin((unit.index, grad), unit.name)

    def _end_run(self, out: Any, grad: bool) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        if not grad:
            self.residency.drop_all()
            return
        self.residency.hide_all()
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(self._output_is_reached)  # type: ignore[no-untyped-call]

    def _enter(self, unit: ShardUnit, phase: Phase, autocast: torch.dtype | None) -> None:
        self.register(unit)
        predicted = self.trace.note(unit.index, phase, unit.name) if unit.moves else None
        if not unit.is_settled and not unit.pins and torch.is_grad_enabled():
            self.residency.drop(unit)
            keep_frozen_apart(unit)
        if not unit.moves:
            return
        try:
            self.residency.need(unit, unit.compute_dtype(autocast))
            coming = self.units.get(predicted) if predicted is not None else None
            if coming is not None:
                self.residency.expect(coming, coming.compute_dtype(autocast))
        except CommunicationError as error:
            raise self.trace.blamed(error, f"the {phase} of {unit.name or 'the root'}") from error

    def _enter_all(self, unit: ShardUnit, phase: Phase, autocast: torch.dtype | None) -> None:
        """Make ``unit`` whole, and what it shares with others, until the innermost forward is over."""
        for other in unit.borrows:
            if not (other.is_whole and other.pins):
                self._enter(other, phase, autocast)
            self._pins.add(other)
        if not (unit.is_whole and phase == "backward"):
            self._enter(unit, phase, autocast)
        self._pins.add(unit)

    def register(self, unit: ShardUnit) -> None:
        """Give ``unit`` its place in the order; the same on all ranks, since all use units in the same order."""
        if unit.index < 0:
            unit.index = self._next_index
            self._next_index += 1
            self.units[unit.index] = unit

    # -- backward -------------------------------------------------------------------------------------------------

    def _output_is_reached(self, _: torch.Tensor) -> None:
        self._backward_starts()
        self._first_graphs.walk()

    def _backward_starts(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.finish_backward)

    def backward_reaches(self, frame: Frame) -> None:
        """The backward needs something that ``frame`` saved.

        Autograd runs nodes in the reverse order of their making, so every frame that began before and does not
        enclose this one is through: its units' gradients are complete.
        """
        self._backward_starts()
        frame.begun = True
        enclosing = set()
        outer = frame.parent
        while outer is not None:
            enclosing.add(outer)
            outer = outer.parent
        for done in self._begun:
            if not done.finished and done not in enclosing:
                self._finish(done)
        self._begun.append(frame)
        if frame.units and not self._recomputing:
            self._enter(frame.units[0], "backward", frame.autocast)

    def _finish(self, frame: Frame) -> None:
        frame.finished = True
        for unit in frame.units:
            unit.open_uses -= 1
            if unit.open_uses <= 0:
                self._reduce(unit)

    def _reduce(self, unit: ShardUnit) -> None:
        try:
            unit.reduce_grads()
        except CommunicationError as error:
            raise self.trace.blamed(error, f"the reduction of {unit.name or 'the root'}") from error

    def rebuild(self, place: PlaceInFlat, autocast: torch.dtype | None) -> torch.Tensor:
        """A view of the re-gathered buffer."""
        flat = place.flat
        if flat.buffer is None:
            self._enter(flat.unit, "backward", autocast)
        assert flat.buffer is not None
        return place.within(flat.buffer.tensor)

    @contextmanager
    def recomputing(self, frame: Frame, note: Callable[[torch.Tensor], Any]) -> Iterator[None]:
        """Around the second run of a block's forward; ``note`` is told of every tensor it would save."""
        unit = frame.units[0] if frame.units else None
        saved, self._frames = self._frames, [frame]
        outer_note, self._note = self._note, note
        self._recomputing += 1
        self._pins.begin()
        try:
            if unit is not None:
                self._enter_all(unit, "backward", frame.autocast)
            yield
        finally:
            self._frames, self._note = saved, outer_note
            self._recomputing -= 1
            self._pins.end()

    @property
    def recompute_note(self) -> Callable[[torch.Tensor], Any] | None:
        """While a block runs a second time: what to call with each tensor that would be saved, instead of saving it."""
        if self._note is None:
            return None
        # None when somebody else's hooks (a checkpoint inside the block) would get those tensors.
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return self._note if top is not None and top[0] is self._note else None

    def whole_flat(self, view: torch.Tensor) -> FlatShard | None:
        """The whole FlatShard (None if none) of whose gather buffer ``view`` is a part."""
        return self.residency.find(view.untyped_storage().data_ptr())

    def finish_backward(self) -> None:
        """Reduce every gradient not reduced yet, in the units' order, and release what is whole.  Collective."""
        self._task = -1
        used = {unit.index for frame in self._begun if not frame.finished for unit in frame.units}
        for frame in self._begun:
            frame.begun = frame.finished = False
        self._begun = []
        for index in sorted(self.units.keys()):
            unit = self.units.get(index)
            if unit is None:
                continue
            if index in used or unit.has_raw_grads():
                self._reduce(unit)
            unit.open_uses = 0
        if self.idle:
            self.residency.drop_all()
        self.pools.tidy()

    def updated(self, unit: ShardUnit) -> None:
        """An optimizer has just changed all of ``unit``: if the next step begins with it, gather it meanwhile."""
        unit.discard()
        if self.ctx.device.is_cuda and self.idle and unit.index in self.trace.opening():
            self.residency.expect(unit, unit.compute)

    def optimizer_stepped(self) -> None:
        """An optimizer has updated all its parameters."""
        self.plan.optimizer_stepped()
