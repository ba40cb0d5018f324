"""The engine: when parameters are whole, and when gradients are reduced."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..autograd import (
    backward_id,
    in_function_transform,
    never_compiled,
    outside_function_transforms,
    running_backward,
)
from ..context import Context, engine_factory
from ..errors import ConfigurationError, ShardedAccessError
from ..log import say
from ..shard.engine import MOST_RUNS, LatestRuns, Run
from ..shard.flat import FlatShard, place_of
from ..shard.unit import ShardUnit, unit_of_flat
from .assign_units import shard_module
from .backward import Backward
from .first_steps.batches import FirstBatches
from .first_steps.buffers import FirstBuffers
from .first_steps.draws import FirstDraws
from .first_steps.hooks import FirstHooks
from .first_steps.leaves import FirstLeaves, leaves_of_no_module
from .first_steps.losses import FirstLosses
from .first_steps.steps import FirstSteps
from .frame import Frame
from .graphs.blocks import Graphs
from .graphs.host_time import HostTime
from .memory import WATCHED_STEPS, MemoryPlan
from .of_no_module import OfNoModule
from .outside_forward import OutsideForward
from .record import has_hooks, unit_of
from .replicas import Replicas
from .saved import KeptValues
from .schedule import Schedule
from .state import attribute
from .step_meter import StepMeter
from .summary import summary
from .trace import Phase
from .untrained import FirstGraphs

T = TypeVar("T")
V = TypeVar("V")
Args = tuple[object, ...]
Kwargs = dict[str, object]
_LITTLE = 0.1
"""Of a step's peak of memory on one rank: so much more is worth it where the host is the limit."""
_Noted = tuple[weakref.ref[nn.Module], Args, Kwargs, torch.dtype | None]  # a Run of a module that may go


@engine_factory
class Engine:
    """Gathers along the observed order, reduces as the backward passes, and gathers on demand what was not foreseen.

    Made of ``schedule`` (which unit when; ``schedule.whole``: who is whole, and why), ``backward`` (what autograd comes
    back to), ``plan`` (what memory is spent on), ``outside`` (whole units where no forward of their module runs) and
    ``replicas`` (what keeps copies of the parameters equal, where there are several).
    """

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.schedule = Schedule(ctx)
        self.whole = self.schedule.whole
        # On a CPU the host does all, and whoever asks for graphs has asked for units that stay.
        self.plan = MemoryPlan(ctx, WATCHED_STEPS if ctx.device.is_cuda and not ctx.graphs else 0)
        self.of_no_module = OfNoModule(ctx)
        self.backward = Backward(self.schedule, self.of_no_module)
        self.first_steps = FirstSteps()
        self.first_batches = FirstBatches(ctx, self.first_steps)
        self.first_buffers = FirstBuffers(ctx)
        self.first_draws = FirstDraws(ctx, self.first_steps)
        self.first_hooks = FirstHooks(ctx, self.first_steps)
        self.first_leaves = FirstLeaves(ctx, self.of_no_module)
        self.first_losses = FirstLosses(ctx, self.backward, self.first_steps)
        self.backward.watch = self if self.first_leaves.wanted else None
        may_record = ctx.graphs is not False and ctx.device.records
        self.graphs = Graphs(ctx, self.plan, self.first_losses) if may_record else None
        self.host_time = HostTime(ctx, self._begin_recording) if ctx.device.is_cuda and ctx.graphs is None else None
        self.meter = None if ctx.meter is None else StepMeter(ctx, ctx.meter)
        self._runs: deque[_Noted] = deque(maxlen=MOST_RUNS)
        self._forwards = 0  # of this step
        self._recomputed = 0  # forwards of blocks so far that were to be recomputed
        self.outside = OutsideForward(self.schedule, self.backward, self.plan)
        self.replicas = Replicas(self.schedule) if ctx.replicate_group.world_size > 1 else None

    # -- sharding -------------------------------------------------------------------------------------------------

    def shard(self, module: nn.Module) -> None:
        """Shard every parameter of ``module`` that is not sharded yet, with rank 0's values.  Collective."""
        self.meet(f"the sharding of {type(module).__name__}")
        arenas = self.schedule.pools.arenas
        arenas.collect()
        units = shard_module(self.schedule.pools, module)
        for path, inner in module.named_modules():
            unit = unit_of(inner)
            if unit is not None and unit.is_block and not unit.name:
                unit.name = path  # a block that was sharded by itself, before what it is part of
        for unit in units:
            if not unit.moves:
                self.schedule.register(unit)  # nothing is gathered, so that code may use it without our noticing
        arenas.watch(module, partial(self._give_up, [weakref.ref(unit) for unit in units]))
        self.first_steps.sharded()

    def _give_up(self, references: Sequence[weakref.ref[ShardUnit]]) -> None:
        """No rank has the model any more: what was whole last, or is on its way, is not waited for."""
        for unit in (reference() for reference in references):
            if unit is not None and not unit.pins and self.whole.why(unit) is not None:
                self.whole.release(unit)
                self.schedule.pools.arenas.look_for_garbage()

    def meet(self, what: str) -> None:
        """Return once every rank has come to ``what``; raises RankDivergenceError if one came elsewhere."""
        self.schedule.trace.meet(what)

    def collect(self) -> None:
        """Give back the memory of models that are gone.  Collective."""
        self.schedule.pools.arenas.collect()

    def comes_to(self, what: str) -> None:
        """Every rank does ``what`` next; raises RankDivergenceError when another does something else."""
        self.schedule.trace.comes_to(what)

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor, what: str) -> None:
        """The same for what ends in gathering ``shard`` into ``whole``, in the shard group.  Collective."""
        self.schedule.trace.comes_to(what)
        self.ctx.shard_group.all_gather(shard, whole)

    # -- forward --------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no distributed module is running."""
        return self.whole.idle

    def forward(
        self, unit: ShardUnit | None, recompute: bool | None, call: Callable[..., T], args: Args, kwargs: Kwargs
    ) -> T:
        """Run one module's forward with its unit whole."""
        grad = torch.is_grad_enabled()
        starts_run, transformed = self.whole.idle and backward_id() is None, in_function_transform()
        if starts_run:
            self.backward.let_go()
            if not transformed:
                self.outside.let_go()
                self._run_starts(unit, grad, call, args, kwargs)
            else:
                with outside_function_transforms():
                    self._run_starts(unit, grad, None, args, kwargs)
        elif unit is not None and unit.stage is not None:
            self._require_stage_runs(unit)
        self.whole.forward_begins()
        try:
            if unit is not None:
                with outside_function_transforms() if transformed else nullcontext():
                    phase: Phase = "backward" if self.backward.recomputes else "forward"
                    self.schedule.use_all(unit, phase, self.ctx.device.autocast())
                    if transformed:
                        self.outside.hold([*unit.borrows, unit])
            framed = grad and not transformed
            out = self._framed(unit, recompute, call, args, kwargs) if framed else call(*args, **kwargs)
        except RuntimeError as error:
            if starts_run:
                self.ctx.device.tell_where(error)
            raise
        finally:
            self.whole.forward_ends()
        if self.schedule.pools.moves and not transformed:
            out = self.outside.given(out, () if unit is None else (unit, *unit.borrows))
        if starts_run:
            self._run_ends(out, framed)
            self._refuse_rounded()
        elif unit is not None and not transformed:
            for used in (unit, *unit.borrows):
                self.whole.leave(used)
        return out

    def _run_starts(
        self, unit: ShardUnit | None, grad: bool, call: Callable[..., object] | None, args: Args, kwargs: Kwargs
    ) -> None:
        """An outermost forward begins; ``call`` is None inside a transform of torch.func."""
        self.ctx.diary.is_apart = False
        if unit is not None and unit.stage is not None:
            self._require_stage_runs(unit)
        self.outside.forward_starts()
        if grad:
            if self.graphs is not None:
                self.graphs.forward_starts()
            self.plan.run_starts(self.schedule.units)
            self.backward.kept = KeptValues.of(self.schedule.pools, self.schedule.units.values())
            if call is not None:
                self._note_run(call, args, kwargs)
                if self.first_batches.wanted and _trains(call):
                    self.first_batches.note((args, kwargs))
                if (self.first_losses.wanted or self.first_leaves.wanted) and _trains(call):
                    self.first_losses.note((args, kwargs))
                self.first_draws.forward_starts()
        if unit is not None:
            self.schedule.run_starts(unit, grad)
            if unit.moves and grad:
                self.plan.note_inputs(args, kwargs)
        if grad and self.host_time is not None and self.host_time.wanted:
            self.host_time.forward_starts()

    def _require_stage_runs(self, unit: ShardUnit) -> None:
        if not self.ctx.diary.is_apart:
            raise ConfigurationError(
                f"{unit.name or 'A block of a pipeline'} was called by itself, but only the ranks of stage "
                f"{unit.stage} have it. Call the whole bmt.PipelineTransformerBlockList. For what goes through blocks "
                "one by one, such as generation with a cache, load the checkpoint into a job without pipe_size."
            )

    def _note_run(self, call: Callable[..., object], args: Args, kwargs: Kwargs) -> None:
        module = getattr(call, "__self__", None)
        if isinstance(module, nn.Module):
            if any(type(value) is not torch.Tensor or value.requires_grad for value in (*args, *kwargs.values())):
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            self._forwards += 1
            if self.meter is not None and module.training:
                self.meter.note_forward(module, (args, kwargs))
            age, is_new = self.first_steps.note(module)
            if is_new:
                self._look_anew()
            self.first_buffers.note(module, age)
            self.first_hooks.note(module, age)
            self._runs.append((weakref.ref(module), args, kwargs, self.ctx.device.autocast()))

    def note_beside(self, module: nn.Module) -> None:
        """``module``, which has no parameters, is called outside of any other."""
        if torch.is_grad_enabled() and module.training:
            self.first_buffers.note_beside(module)

    def _look_anew(self) -> None:
        """A model, or a part of one, that was not there before begins to train."""
        self.backward.first_graphs = FirstGraphs()
        self.first_leaves = FirstLeaves(self.ctx, self.of_no_module)
        self.backward.watch = self if self.first_leaves.wanted else None
        self.first_batches.renew()
        self.first_draws.renew()
        self.first_hooks.renew()
        self.first_losses.renew()

    def latest_runs(self) -> LatestRuns:
        """The forwards since the last optimizer step, a few, without their graphs."""
        noted = list(self._runs)

        def runs() -> list[Run | None]:
            made = [(module(), args, kwargs, autocast) for module, args, kwargs, autocast in noted]
            return [None if module is None else Run(module, args, kwargs, cast) for module, args, kwargs, cast in made]

        return runs

    def _framed(
        self, unit: ShardUnit | None, recompute: bool | None, call: Callable[..., T], args: Args, kwargs: Kwargs
    ) -> T:
        frames = self.backward.frames
        parent = frames[-1] if frames else None
        if parent is not None and parent.recompute:
            # The enclosing block runs again as one piece and takes this one along.
            for used in (unit, *unit.borrows) if unit is not None else ():
                parent.add(used)
            return call(*args, **kwargs)
        choice = recompute
        if recompute is None:
            # Of a stage's blocks the forward of every micro-batch is kept until its backward.
            recompute = unit is not None and (unit.stage is not None or self.plan.recomputes(unit, args, kwargs))
        self._recomputed += bool(recompute)
        if self.graphs is not None and unit is not None and unit.is_block and not recompute and unit.stage is None:
            replay = self.graphs.replay_for(unit, call, args, kwargs)
            if replay is not None:
                return replay(Frame(self.backward, unit, parent, False) if self.schedule.pools.moves else None)
            call = self.graphs.observed(unit, call)
        if not self.schedule.pools.moves and not recompute:
            return call(*args, **kwargs)
        measures = unit is not None and unit.stage is None and choice is None and self.plan.measuring
        measured = self.plan if measures else None
        module = getattr(call, "__self__", None)
        if not recompute or not isinstance(module, nn.Module) or not has_hooks(module):
            return self._run_frame(Frame(self.backward, unit, parent, recompute, measured), call, args, kwargs)
        # The module's own hooks run once, outside of what is recomputed.
        outer, forward = Frame(self.backward, unit, parent, recompute=False), module.forward

        @never_compiled
        def between_hooks(*args: object, **kwargs: object) -> object:
            return self._run_frame(Frame(self.backward, unit, outer, True, measured), forward, args, kwargs)

        with attribute(module, "forward", between_hooks):
            return self._run_frame(outer, call, args, kwargs)

    def _run_frame(self, frame: Frame, call: Callable[..., T], args: Args, kwargs: Kwargs) -> T:
        for other in frame.units[0].borrows if frame.units else ():
            frame.add(other)
        inside = frame.parent is not None and bool(frame.units)
        if inside and self.schedule.pools.moves and self.backward.kept is None:
            copies: dict[int, torch.Tensor] = {}
            args = tuple(self._of_its_own(value, frame.units, copies) for value in args)
            kwargs = {name: self._of_its_own(value, frame.units, copies) for name, value in kwargs.items()}
        self.backward.frames.append(frame)
        try:
            return frame.run(call, args, kwargs)
        finally:
            self.backward.frames.pop()

    def _of_its_own(self, value: V, units: Collection[ShardUnit], copies: dict[int, torch.Tensor]) -> V:
        """``value``, copied if it is a view of a parameter that none of ``units`` holds; one copy of the same tensor.

        Whether a view or a copy is made of a parameter is up to the sizes that a rank sees: ``p.repeat(b, 1, 1)`` of a
        batch of one is often a view. What a block saves of it would be gathered again in the backward, by that rank
        alone. A copy is contiguous, so what is not, as the transpose of a tied weight, is a view on all ranks.
        """
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
            return value
        flat = self.whole.flat_at(value)
        if flat is None or unit_of_flat(flat) in units or not value.is_contiguous():
            return value
        return copies.setdefault(id(value), value.clone())  # type: ignore[return-value]

    def _run_ends(self, out: object, grad: bool) -> None:
        if not grad:
            self.whole.let_go_of_all()
            return
        self.first_draws.forward_ends()
        self.whole.set_back_all()
        self.plan.run_ends()
        if self.host_time is not None:
            self.host_time.forward_ends()
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(self.backward.output_is_reached)  # type: ignore[no-untyped-call]
                self.first_losses.note_output(tensor)

    def _refuse_rounded(self) -> None:
        """Raises ShardedAccessError if code has written to parameters that were whole in lower precision."""
        names, self.schedule.pools.rounded = self.schedule.pools.rounded, []
        if names:
            raise ShardedAccessError(
                f"{', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''} changed in place in a forward, "
                "where autocast or a precision policy has gathered what its layer computes with, in lower precision: "
                "the change would be rounded, and a slow one (a moving average) lost. Write through .data in the "
                "forward, as p.data.lerp_(q.data, 0.01), which autocast does not round; or, under a policy, write "
                "outside of the forward."
            )

    def _begin_recording(self) -> bool:
        """Let blocks run as CUDA graphs. On one rank only if that takes little: there nothing else spares memory."""
        blocks = [unit for unit in self.schedule.units.values() if unit.is_block]
        if self.graphs is None or (self.ctx.world_size == 1 and self.plan.part_in_recordings(blocks) > _LITTLE):
            return False
        self.graphs.begin()
        return True

    @property
    def recompute_note(self) -> Callable[[torch.Tensor], object] | None:
        """While a block runs a second time: what to call with each tensor that would be saved."""
        return self.backward.note

    def whole_flat(self, view: torch.Tensor) -> FlatShard | None:
        """The whole FlatShard (None if none) of whose gather buffer ``view`` is a part."""
        return self.whole.flat_at(view)

    def show_at_rest(self, parameter: torch.Tensor) -> None:
        """Show ``parameter``, and what is gathered with it, in the dtype in which it rests, if that can be done now."""
        self.outside.show_at_rest(unit_of_flat(place_of(parameter)[0]))

    def note_hooks(self, parameter: torch.Tensor) -> None:
        """``parameter`` has got hooks on its gradient."""
        if self.first_hooks.watches:
            self.first_hooks.note_leaf(parameter)

    # -- backward and step ------------------------------------------------------------------------------------------

    @property
    def looks_at_losses(self) -> bool:
        """Whether what autograd keeps of the first losses is looked at, which compiled code would hide."""
        return self.first_losses.wanted

    @property
    def may_inline(self) -> bool:
        """Whether blocks that keep their activations may be run without the engine: nothing moves on one rank."""
        records = self.graphs is not None and self.graphs.is_on
        return self.ctx.world_size == 1 and not self.schedule.pools.moves and not records

    def keeps(self, unit: ShardUnit, recompute: bool | None) -> bool:
        """Whether a block that was told ``recompute`` keeps its activations, unless inputs are larger."""
        return self.plan.keeps(unit) if recompute is None else not recompute

    def whether_all_kept(self, call: Callable[[], T]) -> tuple[T, bool | None]:
        """What ``call`` returns, and whether no block in it is recomputed; None as long as that is being decided."""
        before = self._recomputed
        out = call()
        all_kept = self._recomputed == before
        return out, None if self.plan.is_open and not all_kept else all_kept

    def note_loss(self, loss: torch.Tensor) -> None:
        """Gradients of ``loss`` are to be computed."""
        self.first_losses.note_loss(loss)
        if self.meter is not None:
            self.meter.note_loss(loss)

    def backward_begins(self) -> None:
        """One of the first is running: look at all that it was computed from."""
        roots, frame = running_backward()
        self.first_losses.note_roots(roots, frame)
        leaves = leaves_of_no_module(roots)
        self.first_leaves.note(leaves, self.first_losses.samples, frame)
        if self.first_hooks.wanted:
            for leaf in leaves:
                self.first_hooks.note_leaf(leaf)

    def backward_ends(self) -> None:
        """It is over.  Collective a few times."""
        self.first_leaves.backward_ends()
        if not self.first_leaves.wanted:
            self.backward.watch = None

    def finish_backward(self) -> None:
        """Reduce every gradient that is not reduced yet.  Collective."""
        if backward_id() is not None:
            raise ConfigurationError(
                "Gradients were asked for inside a backward, as by an optimizer that steps in a hook of a parameter. "
                "They are summed over the ranks when the backward is through: step after it, by optim_manager.step()."
            )
        self.outside.let_go()
        self.backward.let_go()
        self.backward.finish()
        self._refuse_rounded()
        if self.replicas is not None:
            self.replicas.ask()

    def note_step(self) -> None:
        """An optimizer begins a step on sharded parameters, on all ranks."""
        self.backward.steps += 1

    def updated(self, units: Sequence[ShardUnit]) -> None:
        """An optimizer has just changed all of ``units``.  Collective."""
        self.first_steps.updated(units)
        self.schedule.updated(units)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes of the device's memory may be held beside a few steps."""
        return self.plan.leaves(size)

    def optimizer_stepped(self, state_bytes: Callable[[], int]) -> None:
        """An optimizer has updated all its parameters; ``state_bytes`` is what its states take on this rank."""
        self.ctx.diary.step += 1
        if self.ctx.diary.step == 1:
            self._tell(state_bytes())
        self._runs.clear()
        self._forwards = 0
        self.backward.kept = None
        if self.replicas is not None:
            self.replicas.level()
        if self.plan.optimizer_stepped():
            self.schedule.pools.collect_garbage()
            self.plan.give_up()
            if self.graphs is not None:
                self.graphs.let_go_of_all()
            self.whole.let_go_of_all()
            self.schedule.pools.trim_params()
        if self.graphs is not None:
            self.graphs.optimizer_stepped()
        if self.host_time is not None and self.host_time.wanted:
            self.host_time.optimizer_stepped(any(unit.is_block for unit in self.schedule.units.values()))
        self.first_batches.optimizer_stepped()
        self.first_buffers.optimizer_stepped()
        self.first_draws.optimizer_stepped()
        self.first_losses.optimizer_stepped()
        self.first_steps.optimizer_stepped()
        if self.meter is not None:
            self.meter.optimizer_stepped()

    def _tell(self, state_bytes: int) -> None:
        if self.ctx.rank == 0 and self.schedule.units:
            inputs = [(args, kwargs) for _, args, kwargs, _ in self._runs]
            for line in summary(self.ctx, self.schedule.units.values(), state_bytes, self._forwards, inputs):
                say(line)


def _trains(call: Callable[..., object]) -> bool:
    return bool(getattr(getattr(call, "__self__", None), "training", False))
