"""Blocks that the host queues by one call each: their forward and their backward, recorded as CUDA graphs.

A small model's step is as long as the host needs to ask the device for some hundred operations a block.  Where a block
is given the same shapes every time, and its parameters lie where they lay (one rank, or units that stay whole), what
it asks for is the same every time.  So its Python runs in the first steps; then it is recorded once and queued again.

A recording holds the memory of what its block saves and of its gradients, for good, and has one forward at a time on
its way to the backward.  Whatever does not fit it runs as it is written: a second forward before the backward, other
shapes, results of the last step that somebody still holds, a module that has changed since.  A second backward, or one
that is to be differentiated, runs the forward as it is written once more.  A block is left alone, and the reason is
said, when its first runs show what a recording would miss: Python state that moves, numbers drawn by the host, waits
for the device, hooks, whatever else is done beside (``facts``).

Where nobody has said whether to, it begins when the device waits for the host (``host_time``) and memory allows, and
leaves blocks alone whose Python may read what cannot be seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.utils._pytree import tree_flatten

from ...autograd import backward_id, runs_as_written
from ...context import Context
from ...device import AutocastRegions, autocast_regions
from ...errors import ConfigurationError
from ...log import say
from ...shard.flat import flat_of
from ...shard.unit import ShardUnit, unit_of_flat
from ..first_steps.losses import FirstLosses
from ..frame import Frame
from ..linear import leave_to_autograd
from ..memory import MemoryPlan
from ..record import has_hooks, unit_of
from ..state import State
from .doings import Doings
from .facts import Facts
from .may_read import CONSTANTS, Executed
from .recording import Inputs, Observed, Outputs, Recording, trained_by

T = TypeVar("T")

_FIRST_STEP = 3  # by then the plan for memory is made, and nobody looks at first losses and draws any more
_MOST = 2  # recordings of one block: each holds its memory
_MOST_INPUTS = 8  # kinds of inputs that are looked at before a block is given up
_MOST_CHANGES = 4  # of a module after it was looked at


class Graphs:
    """What is recorded of all blocks of this process.

    Attributes:
        is_automatic: whether nobody has asked for it, so that what cannot be seen counts as a reason against it.
        is_on: whether blocks are recorded.
        outputs: by where they lie, the recordings whose results lie there: the next block reads them in place.
        forward: the number of the outermost forward.
    """

    def __init__(self, ctx: Context, plan: MemoryPlan, first_losses: FirstLosses) -> None:
        self.ctx, self.plan, self._first_losses = ctx, plan, first_losses
        self.is_automatic = ctx.graphs is None
        self.is_on = not self.is_automatic
        self.outputs: Outputs = weakref.WeakValueDictionary()
        self.forward = 0
        self._units: weakref.WeakSet[ShardUnit] = weakref.WeakSet()
        self._news = False

    def forward_starts(self) -> None:
        """An outermost forward begins: what Python reads may be something else than in the last one."""
        self.forward += 1

    def replay_for(
        self, unit: ShardUnit, call: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Frame | None], T] | None:
        """What runs this forward of ``unit``'s block from a recording, made now if need be; None: nothing does."""
        self.plan.may_record = self.ctx.world_size > 1 or not self.is_automatic
        block = self._block(unit, call)
        return None if block is None else block.replay_for(call, args, kwargs)

    def observed(self, unit: ShardUnit, call: Callable[..., T]) -> Callable[..., T]:
        """``call``, which runs as it is written; if the block may be recorded next, with a look at what it does."""
        block = unit.recorded
        return block.observed(call) if isinstance(block, _Block) else call

    def _block(self, unit: ShardUnit, call: Callable[..., object]) -> _Block | None:
        if not self.is_on or self.ctx.diary.step < _FIRST_STEP or self.plan.measuring or self._first_losses.wanted:
            return None
        if unit.moves and not unit.is_kept:
            return None
        if torch._C._len_torch_dispatch_stack() or torch.is_anomaly_enabled() or _sees_every_module():
            return None  # somebody looks at every operation, or every module
        block = unit.recorded
        if not isinstance(block, _Block):
            module = getattr(call, "__self__", None)
            assert isinstance(module, nn.Module)
            unit.recorded = block = _Block(self, unit, module)
            self._units.add(unit)
        return block if block.reason is None else None

    def blocks(self) -> list[_Block]:
        """Those that were looked at."""
        return [unit.recorded for unit in self._units if isinstance(unit.recorded, _Block)]

    def let_go_of_all(self) -> None:
        """Forget what is recorded: its memory is wanted."""
        for unit in self._units:
            unit.recorded = None
        self._units.clear()

    def begin(self) -> None:
        """Record blocks from now on."""
        self.is_on = True

    def changed(self) -> None:
        """There is something to say."""
        self._news = True

    def optimizer_stepped(self) -> None:
        """A step is over: on rank 0, say what has changed."""
        if not self._news:
            return
        self._news = False
        blocks = self.blocks()
        reasons: dict[str, int] = {}
        for block in blocks:
            if block.reason is not None:
                reasons[block.reason] = reasons.get(block.reason, 0) + 1
        recorded = sum(block.is_recorded for block in blocks)
        if self.ctx.rank == 0 and (recorded or reasons):
            others = "".join(f"; {count} not: {reason}" for reason, count in reasons.items())
            why = ", as the GPU waits for the host (BMTRAIN_GRAPHS=0: as written)" if self.is_automatic else ""
            say(f"{recorded} of {len(blocks)} blocks run as CUDA graphs{why}{others}.")


class _Block:
    """One block: whether it can be recorded, and its recordings.

    Attributes:
        reason: why it is not; None as long as it may be.
    """

    def __init__(self, graphs: Graphs, unit: ShardUnit, module: nn.Module) -> None:
        self.graphs, self._unit = graphs, weakref.ref(unit)
        self._recordings: list[Recording] = []
        self._seen: dict[tuple[Any, ...], Facts | None] = {}  # by kind of inputs, what held after a run looked at
        self._looked_at: tuple[Any, ...] = ()
        self._looks = False  # whether the run that begins is looked at
        self._changes = 0
        self._executed: Executed = {}
        self._regions: AutocastRegions | None = None  # of autocast, around a backward
        self._backward: int | None = None  # that which has come to the run looked at
        self._repeats = True  # whether a second run of the forward would do the same
        self.reason: str | None = None
        reason = _objection(module, unit, graphs.ctx)
        if reason is not None:
            self.give_up(reason)
        else:
            leave_to_autograd(module)

    @property
    def is_recorded(self) -> bool:
        """Whether it runs from a recording."""
        return bool(self._recordings)

    def give_up(self, reason: str) -> None:
        """Run as it is written from now on."""
        self.reason, self._recordings = reason, []
        self.graphs.changed()

    def replay_for(
        self, call: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Frame | None], T] | None:
        """As ``Graphs.replay_for``."""
        self._looks = False
        device = self.graphs.ctx.device
        inputs = Inputs.of(args, kwargs, device.torch_device, device.autocast())
        if isinstance(inputs, str):
            self.give_up(inputs)
            return None
        recording = next((known for known in self._recordings if known.rest == inputs.rest), None)
        if recording is not None and not recording.is_valid(self.graphs.forward):
            self._recordings.remove(recording)
            self._has_changed(recording.rest)
            if self.reason is not None:
                return None
            recording = None
        if recording is None:
            recording = self._record(call, inputs)
        if recording is None or not recording.takes(inputs.tensors):
            return None
        taken = recording
        return lambda frame: taken.run(frame, inputs.tensors)

    def _has_changed(self, kind: tuple[Any, ...]) -> None:
        self._changes += 1
        self._seen.pop(kind)
        if self._changes > _MOST_CHANGES:
            self.give_up("its module, or what its Python reads, changes again and again")

    def _record(self, call: Callable[..., Any], inputs: Inputs) -> Recording | None:
        facts = self._seen.get(inputs.rest)
        if facts is not None and not facts.hold():  # its backward may have changed it
            self._has_changed(inputs.rest)
            if self.reason is not None:
                return None
        if inputs.rest not in self._seen:
            if len(self._seen) == _MOST_INPUTS:
                self.give_up("it is given something else again and again")
            elif len(self._recordings) < _MOST:
                self._looks, self._looked_at = True, inputs.rest
                self._seen[inputs.rest] = None
            return None
        if facts is None or self._regions is None:
            return None  # its backward is still to come
        unit, module = self._unit(), getattr(call, "__self__", None)
        if len(self._recordings) == _MOST or unit is None or not isinstance(module, nn.Module):
            return None
        observed = Observed(facts, self._regions, self._repeats)
        made = _objection(module, unit, self.graphs.ctx) or self._made(unit, call, inputs, observed)
        if isinstance(made, str):
            self.give_up(made)
            return None
        self._recordings.append(made)
        self.graphs.changed()
        return made

    def _made(self, unit: ShardUnit, call: Callable[..., Any], inputs: Inputs, observed: Observed) -> Recording | str:
        """A recording, or why there is none."""
        if not self.graphs.plan.has_room():
            return "too little memory is free"
        device = self.graphs.ctx.device
        numbers = device.rng_state()
        try:
            recording = Recording(self.graphs.ctx, self.graphs.outputs, unit, call, inputs, observed)
        except ConfigurationError as error:
            return str(error)
        except Exception as error:  # whatever the device refuses to record runs as it did before
            text = "".join(str(error).splitlines()[:1])
            return f"recording it ended in {type(error).__name__}: {text[:200]}"
        if not observed.facts.hold():
            return "its forward or backward changes a global, or what an object holds"
        if self._draws_on_host(device.drawn_since(numbers)):
            device.set_rng_state(numbers)
            return "its backward draws random numbers on the host"
        return recording

    def observed(self, call: Callable[..., T]) -> Callable[..., T]:
        """As ``Graphs.observed``."""
        if not self._looks:
            return call
        self._looks = False
        return lambda *args, **kwargs: self._observe(call, args, kwargs)

    def _observe(self, call: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        module, device = getattr(call, "__self__", None), self.graphs.ctx.device
        assert isinstance(module, nn.Module)
        state, facts, doings = State(), Facts(module, self._executed), Doings()
        given = _Given(args, kwargs)
        before, numbers = state.before_run(module, lambda _: False), device.rng_state()
        try:
            with device.host_waits() as waits, doings:
                out = call(*args, **kwargs)
        except BaseException:
            del self._seen[self._looked_at]  # that says nothing of other runs
            raise
        self._executed |= doings.executed
        self._backward = None
        moved = [entry for entry in state.after_run(module, before) if entry.holder.get(entry.name) is not entry.value]
        moved += [e for e in before if e.moved and not isinstance(e.value, torch.Tensor) and e not in moved]
        drawn = device.drawn_since(numbers)
        self._repeats &= not any(drawn) and not any(entry.moved for entry in before)
        if moved:
            self.give_up(f"its forward changes {moved[0].name}")
        elif not facts.hold():
            self.give_up("its forward changes a global, or what an object holds")
        elif given.changed():
            self.give_up("its forward changes what it is given")
        elif doings.found is not None:
            self.give_up(f"its forward {doings.found}")
        elif self._draws_on_host(drawn):
            self.give_up("its forward draws random numbers on the host")
        elif waits:
            self.give_up(f"its forward waits for the device, at {waits[0]}")
        else:
            facts = Facts(module, self._executed)
            reason = _objection_to_results(module, out, (args, kwargs)) or facts.reason
            if self.graphs.is_automatic:
                reason = reason or doings.unseen or facts.unseen
            if reason is not None:
                self.give_up(reason)
            else:
                self._seen[self._looked_at] = facts
                for leaf in filter(_is_trained, tree_flatten(out)[0]):
                    leaf.register_hook(self._backward_begins)
        return out

    @runs_as_written
    def _backward_begins(self, _: torch.Tensor) -> None:
        self._regions = autocast_regions()
        before, self._backward = self._backward, backward_id()
        if torch.is_grad_enabled() or before not in (None, self._backward):
            self.give_up("more than one backward goes through it")

    def _draws_on_host(self, drawn: Sequence[bool]) -> bool:
        return any(drawn[1:] if self.graphs.ctx.device.is_cuda else drawn[-2:])


class _Given:
    """What a forward is given, to see whether it changes that."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._all = (args, kwargs)
        self._leaves, self._spec = tree_flatten(self._all)
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        # A kernel that is not torch's, or .data, leaves the version as it is.
        self._tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]

    def changed(self) -> bool:
        """Whether it is different now."""
        leaves, spec = tree_flatten(self._all)
        if spec != self._spec or any(one is not other for one, other in zip(leaves, self._leaves, strict=True)):
            return True
        return any(t._version != version or _differ(t.detach(), value) for t, version, value in self._tensors)


def _sees_every_module() -> bool:
    """Whether there are hooks on all modules."""
    return bool(
        all_modules._global_forward_pre_hooks
        or all_modules._global_forward_hooks
        or all_modules._global_backward_pre_hooks
        or all_modules._global_backward_hooks
    )


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not bool(((one == other) | (one != one)).all())


def _objection(module: nn.Module, unit: ShardUnit, ctx: Context) -> str | None:
    """Why ``module`` cannot be recorded, as far as that is seen without running it."""
    if ctx.memory == "lean":
        return 'memory="lean" was asked for'
    if unit.borrows:
        return "it shares parameters with others"
    for inner in module.modules():
        if inner is not module and unit_of(inner) is not None:
            return "there are blocks inside"
        if has_hooks(inner):
            return "there are hooks on its modules"
    for parameter in module.parameters():
        flat = flat_of(parameter)
        if flat is None or unit_of_flat(flat) is not unit:
            return "it has parameters that were put in later, or are another's"
        if flat.is_slice:
            return "it is split over tensor-parallel ranks"
    return None


def _objection_to_results(module: nn.Module, out: Any, inputs: Any) -> str | None:
    leaves, _ = tree_flatten(out)
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, torch.Tensor)]
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if type(leaf) is not torch.Tensor or leaf.layout is not torch.strided:
                return f"its forward returns a {type(leaf).__name__}"
            if leaf.untyped_storage().data_ptr() in given:
                return "its forward returns what it was given, or the same part of memory twice"
            given.add(leaf.untyped_storage().data_ptr())
        elif not isinstance(leaf, CONSTANTS):
            return f"its forward returns a {type(leaf).__name__}"
    if not any(map(_is_trained, leaves)):
        return "nothing it returns requires a gradient"
    own = {id(tensor) for tensor in (*module.parameters(), *tensors)}
    before = {tensor.grad_fn for tensor in tensors}
    if any(id(leaf) not in own for leaf in trained_by(leaves, before)):
        return "it computes with parameters, or what was made of some, that are not its own"
    return None


def _is_trained(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad
