"""One block's forward and backward, recorded for one kind of inputs, and queued again.  Whether to: ``graphs``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...autograd import runs_as_written
from ...context import Context
from ...device import AutocastRegions, autocast_regions, in_autocast_regions
from ...errors import ConfigurationError
from ...shard.parameter import DistributedParameter, like, raw_data
from ...shard.pools import holders_of
from ...shard.unit import ShardUnit
from ..frame import Frame
from ..surroundings import Surroundings
from .facts import Facts
from .may_read import CONSTANTS, CONTAINERS


class Inputs(NamedTuple):
    """What a block is called with: the tensors, each once, and all the rest, which a recording takes as constant."""

    tensors: list[torch.Tensor]
    rest: tuple[Any, ...]

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, autocast: torch.dtype | None
    ) -> Inputs | str:
        """Of these arguments, or why a recording cannot take them."""
        leaves: Sequence[Any] = (*args, *kwargs.values())
        spec: Any = (len(args), *kwargs)
        if any(isinstance(leaf, (tuple, *CONTAINERS)) for leaf in leaves):
            leaves, spec = tree_flatten((args, kwargs))
        tensors: list[torch.Tensor] = []
        numbers: dict[int, int] = {}
        facts: list[Any] = [spec, autocast]
        for leaf in leaves:
            if type(leaf) is torch.Tensor:
                if leaf.device != device:
                    return f"it is given a tensor on {leaf.device.type}, whose value a recording takes as constant"
                number = numbers.setdefault(id(leaf), len(tensors))
                if number == len(tensors):
                    tensors.append(leaf)
                facts.append((number, leaf.shape, leaf.dtype, leaf.requires_grad, leaf.stride()))
            elif isinstance(leaf, CONSTANTS):
                facts.append((type(leaf), leaf))
            else:
                name = type(leaf).__name__
                return f"it is given a {name}" + " (use_cache=False leaves it out)" * name.endswith("Cache")
        return cls(tensors, tuple(facts))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, with these in place of the tensors."""
        spec, _, *facts = self.rest
        leaves = [tensors[fact[0]] if isinstance(fact[0], int) else fact[1] for fact in facts]
        if isinstance(spec, TreeSpec):
            args, kwargs = tree_unflatten(leaves, spec)
            return args, kwargs
        count, *names = spec
        return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))


class Observed(NamedTuple):
    """What a run that was looked at has shown: what it read, autocast in its backward, and if it can run once more."""

    facts: Facts
    regions: AutocastRegions
    repeats: bool


class Recording:
    """One block's forward and backward for one kind of inputs.

    Attributes:
        rest: what must be the same for this to be what the block would do.
    """

    def __init__(
        self,
        ctx: Context,
        outputs: Outputs,
        unit: ShardUnit,
        call: Callable[..., Any],
        inputs: Inputs,
        observed: Observed,
    ) -> None:
        module = getattr(call, "__self__", None)
        assert isinstance(module, nn.Module)
        self.rest, self._repeats = inputs.rest, observed.repeats
        self._ctx, self._others, self._unit, self._call = ctx, outputs, weakref.ref(unit), call
        self._addresses, self._facts, self._forward = _addresses(unit), observed.facts, -1
        self._surroundings, self._settings = Surroundings(), _settings()
        self._regions, self._forward_regions = observed.regions, autocast_regions()
        self._use: weakref.ref[_Use] | None = None
        self._readers = 0  # recordings that read results of this one in place
        self._sources: list[Recording | None] = []  # those whose results this one reads
        self._inputs = [self._place_for(tensor) for tensor in inputs.tensors]
        self._args, self._kwargs = inputs.with_tensors(self._inputs)
        self.parameters = self._facts.trained()
        # In their places while the block's Python runs: what autograd keeps of the real ones is of other streams.
        self._modules = list(module.modules())
        holders = [inner._parameters for inner in self._modules]
        self._places: list[tuple[dict[str, Any], str, Any]]
        self._places = [(holder, n, p) for holder in holders for n, p in holder.items() if p is not None]
        self._stand_ins = {id(parameter): _alias(parameter) for _, _, parameter in self._places}
        self._wanted = [tensor for tensor in self._inputs if tensor.requires_grad]
        self._wanted += [self._stand_ins[id(parameter)] for parameter in self.parameters]
        self._outputs: list[torch.Tensor] = []
        self._output_gradients: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor | None] = []
        self._reached: list[set[int]] = []  # by result that requires a gradient, which of those wanted it is made of
        self._leaves: list[Any] = []  # of what the block returns; of tensors where among the outputs they are
        self._spec: TreeSpec | None = None
        self._copied: list[bool] = []  # of each result, whether its user gets a copy, as of what the backward needs
        self._kept: set[int] = set()  # where what autograd has saved lies
        self._needed: list[bool] = []  # of each input, whether the backward needs it
        self._users: list[int] = []
        recorder = ctx.device.recorder()
        self._is_real = recorder.is_real
        torch.clear_autocast_cache()
        try:
            self._queue_forward = recorder.record(self._run_forward)
            self._queue_backward = recorder.record(self._run_backward)
        finally:
            torch.clear_autocast_cache()  # what was cast lies in memory of the recording
        if self._is_real:
            self._settle()

    def _place_for(self, tensor: torch.Tensor) -> torch.Tensor:
        source = self._others.get(tensor.data_ptr())
        if source is not None and source.has_output_like(tensor):
            source._readers += 1
            self._sources.append(source)
            place = tensor.detach()
        else:
            self._sources.append(None)
            place = torch.empty_like(tensor, requires_grad=False)
        return place.requires_grad_(tensor.requires_grad)

    # -- what is recorded -----------------------------------------------------------------------------------------

    def _run_forward(self) -> None:
        with ExitStack() as stack:
            for inner in self._modules:
                stack.callback(inner.__dict__.update, dict(inner.__dict__))  # an LSTM keeps a list of its parameters
            for holder, name, parameter in self._places:
                holder[name] = self._stand_ins[id(parameter)]
                stack.callback(holder.__setitem__, name, parameter)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
            out = self._call(*self._args, **self._kwargs)
        leaves, self._spec = tree_flatten(out)
        self._outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        numbers = iter(range(len(leaves)))
        self._leaves = [_Number(next(numbers)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.differentiable = [output.requires_grad for output in self._outputs]
        if not self._reached:
            numbers_of = {id(wanted): number for number, wanted in enumerate(self._wanted)}
            leaves_of = [trained_by([output], set()) for output in self._outputs if output.requires_grad]
            if not all(id(leaf) in numbers_of for leaf in chain.from_iterable(leaves_of)):
                raise ConfigurationError("it computes with parameters that it keeps elsewhere than under their names")
            self._reached = [{numbers_of[id(leaf)] for leaf in leaves} for leaves in leaves_of]

    @runs_as_written
    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            self._kept.add(tensor.untyped_storage().data_ptr())
        return tensor.detach()  # the tensor itself could hold the graph that holds it

    def _run_backward(self) -> None:
        reached = [output for output in self._outputs if output.requires_grad]
        if not self._output_gradients:
            self._output_gradients = [torch.empty_like(output, requires_grad=False) for output in reached]
        gradients = self._output_gradients
        with in_autocast_regions(self._regions):
            self._gradients = list(torch.autograd.grad(reached, self._wanted, gradients, allow_unused=True))

    def _settle(self) -> None:
        """Autograd is through with what was recorded: keep where results lie, and no graph."""
        self._copied = [output.untyped_storage().data_ptr() in self._kept for output in self._outputs]
        self._needed = [place.untyped_storage().data_ptr() in self._kept for place in self._inputs]
        self._outputs = [output.detach() for output in self._outputs]
        self._wanted, self._places, self._stand_ins, self._modules = [], [], {}, []
        self._users = list(map(holders_of, self._shown()))
        for output, copied in zip(self._outputs, self._copied, strict=True):
            if not copied:
                self._others[output.data_ptr()] = self

    def _shown(self) -> list[torch.Tensor]:
        """What others may hold when it is written again."""
        return self._outputs + [gradient for gradient in self._gradients if gradient is not None]

    # -- what is queued -------------------------------------------------------------------------------------------

    def is_valid(self, forward: int) -> bool:
        """Whether the block would still do what was recorded.

        All that its Python may read is looked at once in an outermost forward, whose number is ``forward``; attributes
        of its modules every time.
        """
        unit = self._unit()
        if unit is None or _addresses(unit) != self._addresses or not self._facts.attributes_hold():
            return False
        if forward != self._forward:
            if not self._facts.hold():
                return False
            self._forward = forward
        return self._settings == _settings() and self._surroundings.are_like(Surroundings())

    def is_as_recorded(self) -> bool:
        """Whether a backward that begins is one of first order, under the autocast of the one that was looked at."""
        return not torch.is_grad_enabled() and _lively(autocast_regions()) == _lively(self._regions)

    def require_parameters(self) -> None:
        """Raises ConfigurationError unless parameters lie where the forward read them."""
        unit = self._unit()
        if unit is None or _addresses(unit) != self._addresses:
            raise ConfigurationError(
                "Parameters of a block that ran as a CUDA graph were written, or gathered in another dtype, before its "
                "backward, and lie elsewhere now. Do that before the forward or after the backward, or set "
                "BMTRAIN_GRAPHS=0 in the environment (graphs=False in bmt.init_distributed)."
            )

    def run_again(
        self, inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], frame: Frame | None
    ) -> list[torch.Tensor | None]:
        """As ``backward``, from a second run of the block's Python with the same inputs.

        Raises ConfigurationError if that would not do the same.
        """
        self.require_parameters()
        if not self._repeats:
            raise ConfigurationError(
                "A backward came a second time (retain_graph=True, create_graph=True), or under another torch.autocast "
                "than at first, to a block that runs as a CUDA graph, and draws random numbers or changes its buffers: "
                "it would not do the same again. Set BMTRAIN_GRAPHS=0 in the environment (graphs=False in "
                "bmt.init_distributed)."
            )
        args, kwargs = Inputs([], self.rest).with_tensors(inputs)
        with torch.enable_grad(), in_autocast_regions(self._forward_regions), _saved_by(frame):
            out = self._call(*args, **kwargs)
        results = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        given = [gradient for gradient, counts in zip(gradients, self.differentiable, strict=True) if counts]
        pairs = [(result, g) for result, g in zip(results, given, strict=True) if g is not None]
        wanted = [tensor for tensor in (*inputs, *self.parameters) if tensor.requires_grad]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in pairs], wanted, [gradient for _, gradient in pairs],
                create_graph=torch.is_grad_enabled(), allow_unused=True,
            )
        )  # fmt: skip
        return [next(found) if tensor.requires_grad else None for tensor in (*inputs, *self.parameters)]

    def takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it is free for a forward of these."""
        use = None if self._use is None else self._use()
        if use is not None and not use.is_over:
            return False
        if not self._is_real:
            return True
        for source, place, tensor in zip(self._sources, self._inputs, tensors, strict=True):
            if source is not None and place.data_ptr() != tensor.data_ptr():
                return False  # what lies there may be needed
        users, readers = map(holders_of, self._shown()), self._readers
        return all(now <= before + readers for now, before in zip(users, self._users, strict=True))

    def has_output_like(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a result of the forward that ran last."""
        same = (output for output in self._outputs if output.data_ptr() == tensor.data_ptr())
        return any(output.shape == tensor.shape and output.stride() == tensor.stride() for output in same)

    def run(self, frame: Frame | None, tensors: Sequence[torch.Tensor]) -> Any:
        """The block's forward."""
        use = _Use(self, frame, [])
        self._use = weakref.ref(use)
        for source, tensor, needed in zip(self._sources, tensors, self._needed or repeat(True), strict=False):
            if source is not None and needed:
                use.read.append((tensor.detach(), tensor._version))
        with _saved_by(frame):
            outputs = _Replay.apply(use, len(tensors), *tensors, *self.parameters)  # type: ignore[no-untyped-call]
        leaves = [outputs[leaf.number] if isinstance(leaf, _Number) else leaf for leaf in self._leaves]
        assert self._spec is not None
        return leaves[0] if self._spec.is_leaf() else tree_unflatten(leaves, self._spec)

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Queue the forward of ``tensors`` and give its results."""
        pairs = [(p, t) for p, t in zip(self._inputs, tensors, strict=False) if p.data_ptr() != t.data_ptr()]
        if pairs:
            torch._foreach_copy_([place.detach() for place, _ in pairs], [tensor for _, tensor in pairs])
        self._queue_forward()
        copied = self._copied or repeat(False)
        return tuple(out.clone() if copy else out.detach() for out, copy in zip(self._outputs, copied, strict=False))

    def backward(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Queue the backward; the gradients of inputs, None for those that need none, and of ``parameters``.

        Where nobody asks for the gradient of a result, None is what those get that are part of no other.
        """
        given = [gradient for gradient, counts in zip(gradients, self.differentiable, strict=True) if counts]
        outputs = [output for output, counts in zip(self._outputs, self.differentiable, strict=True) if counts]
        whole = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, given, strict=True)]
        if self._output_gradients:
            torch._foreach_copy_(self._output_gradients, whole)
        else:
            self._output_gradients = whole
        self._queue_backward()
        gradients = [None if gradient is None else gradient.detach() for gradient in self._gradients]
        if any(gradient is None for gradient in given):
            asked = set().union(*(r for r, g in zip(self._reached, given, strict=True) if g is not None))
            gradients = [gradient if number in asked else None for number, gradient in enumerate(gradients)]
        found = iter(gradients)
        return [next(found) if place.requires_grad else None for place in self._inputs] + list(found)


Outputs = weakref.WeakValueDictionary[int, Recording]
"""By where they lie, the recordings whose results lie there: the next block reads them in place."""


@dataclass(frozen=True)
class _Number:
    """A result's place among the outputs."""

    number: int


@dataclass(eq=False)
class _Use:
    """One forward on its way to the backward.

    Attributes:
        frame: what the runtime knows of it; None on one rank.
        read: inputs that are not copied, and their versions when the forward read them.
    """

    recording: Recording
    frame: Frame | None
    read: list[tuple[torch.Tensor, int]]
    is_over: bool = False

    def ends(self) -> None:
        """Its backward begins."""
        if any(tensor._version != version for tensor, version in self.read):
            raise ConfigurationError(
                "What one block returned and the next one read was changed in place before the backward, which needs "
                "it: write x = x + y for x += y."
            )
        self.is_over = True
        self.read.clear()  # a loss that is held to the next step holds this
        self.recording.require_parameters()


class _Replay(torch.autograd.Function):
    """A block's forward and backward, as autograd sees them."""

    @staticmethod
    def forward(ctx: Any, use: _Use, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.use, recording = use, use.recording
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:count])
        outputs = recording.forward(tensors)
        ctx.mark_non_differentiable(
            *(output for output, counts in zip(outputs, recording.differentiable, strict=True) if not counts)
        )
        return outputs

    @staticmethod
    @runs_as_written
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        use: _Use = ctx.use
        if use.frame is not None:
            use.frame.reach()
        if use.is_over or not use.recording.is_as_recorded():
            return (None, None, *use.recording.run_again(ctx.saved_tensors, gradients, use.frame))
        use.ends()
        return (None, None, *use.recording.backward(gradients))


def _saved_by(frame: Frame | None) -> AbstractContextManager[object]:
    """What autograd saves inside is the block's, not that of a module around it, as where the block runs as it is
    written: another rank may have it do so, and what is saved says what ranks do together in the backward.
    """
    return nullcontext() if frame is None else frame.hooks()


def _alias(parameter: DistributedParameter) -> DistributedParameter:
    """Another parameter that lies where this one lies now, and is asked alike."""
    made = like(parameter, raw_data(parameter).detach())
    made._flat, made._index = parameter._flat, parameter._index
    return made


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _addresses(unit: ShardUnit) -> list[tuple[int, torch.dtype]]:
    """Where whole parameters lie."""
    memory = [flat.shard if flat.buffer is None else flat.buffer.tensor for flat in unit.flats]
    return [(tensor.data_ptr(), tensor.dtype) for tensor in memory]


def _lively(regions: AutocastRegions) -> AutocastRegions:
    return [region for region in regions if region[1]]


def _settings() -> tuple[Any, ...]:
    """How kernels are chosen, beside what ``Surroundings`` has."""
    # Not torch.get_float32_matmul_precision(), which raises where a script has set torch.backends' fp32_precision.
    return (
        *[torch._C._get_fp32_precision_getter("cuda", kind) for kind in ("matmul", "conv", "rnn")],
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_blas_preferred_backend(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )


def trained_by(results: Sequence[Any], before: set[Any]) -> list[torch.Tensor]:
    """What a backward from ``results`` leaves gradients on, if it goes no further than the nodes ``before``."""
    waiting: list[Any] = [leaf.grad_fn for leaf in results if isinstance(leaf, torch.Tensor)]
    seen, found = {None, *before}, list[torch.Tensor]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += (following for following, _ in node.next_functions)
    return found
