"""The whole estimate: what is held all the time, and what a step takes beside that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..block import BMTrainModelWrapper
from ..block.block import Block
from ..block.linear import lands
from ..block.record import record_of
from ..context import context
from ..errors import ConfigurationError
from ..precision import Precision
from .live import LiveBytes, as_on_gpu, gradients_go
from .scaling import Work
from .shards import Flat, Held, flats_of, held, work_of

_KINDS = {
    "long": torch.int64, "int": torch.int64, "bool": torch.bool, "float": torch.float32, "bf16": torch.bfloat16,
    "fp16": torch.float16, "fp32": torch.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what.

    Attributes:
        gpus: ranks in all, over which everything is sharded.
        batch: sequences that each of them sees at a time.
        length: tokens of a sequence.
        dtype: what the model is cast to when it is built ("bf16", as ``model.bfloat16()``); None leaves it.
        precision: as in ``init_distributed``.
        autocast: the dtype of ``torch.autocast`` around the forward; None for none.
        accumulates: whether an optimizer step takes several backwards.
        inputs: shapes by argument of forward, ``"BxTx80:float"``; B is the batch, T the length.  The others that
            forward needs are integers, (B, T).
    """

    gpus: int = 1
    batch: int = 1
    length: int = 1024
    dtype: torch.dtype | None = None
    precision: Precision = field(default_factory=Precision)
    autocast: torch.dtype | None = None
    accumulates: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each rank.

    Attributes:
        parameters, trained, units, blocks: how many.
        held: what is there all the time.
        buffers: the model's own, and the batch.
        recomputed, kept: the most that a forward and a backward have alive beside that, with blocks that are
            recomputed where nothing else was said (``memory="lean"``), and with none of those; None if the forward
            cannot run without values.
        problem: why it cannot.
        loss: what was taken for the loss.
        tests: how often the forward asked whether something holds of values, which was taken for true.
    """

    parameters: int
    trained: int
    units: int
    blocks: int
    held: Held
    buffers: int
    recomputed: int | None = None
    kept: int | None = None
    problem: str = ""
    loss: str = ""
    tests: int = 0

    def total(self, keep: bool = False) -> int:
        """All of it."""
        return self.held.total + self.buffers + ((self.kept if keep else self.recomputed) or 0)


class Model:
    """A model without values, built as ``init_distributed`` and the constructors would, but not sharded."""

    def __init__(self, factory: Callable[[], Any], dtype: torch.dtype | None = None) -> None:
        """Raises ConfigurationError when ``factory`` makes no module, or one that cannot be sharded."""
        with _whole():
            self.module = _built(factory)
            if dtype is not None:
                self.module.to(dtype)
            BMTrainModelWrapper(self.module)
        self.blocks = [module for module in self.module.modules() if isinstance(module, Block)]

    def estimate(self, job: Job) -> Estimate:
        """What ``job`` takes on each rank; its dtype is that of this model already."""
        units = flats_of(self.module, job.precision, job.gpus, job.autocast)
        flats = [flat for unit in units for flat in unit]
        sizes = [(p.numel(), p.requires_grad) for flat in flats for p in flat.parameters]
        buffers = sum({id(b): b.nbytes for b in self.module.buffers()}.values())
        found = Estimate(
            sum(number for number, _ in sizes), sum(number for number, trains in sizes if trains), len(units),
            len(self.blocks), held(flats, job.gpus, job.accumulates), buffers,
        )  # fmt: skip
        try:
            inputs = _inputs(self.module, job)
            recomputed, _, _ = self._live(job, units, inputs, keep=False)
            kept, loss, tests = self._live(job, units, inputs, keep=True)
        except ConfigurationError:
            raise
        except Exception as error:  # the model's own code, which may ask for anything
            return replace(found, problem=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return replace(found, recomputed=recomputed, kept=kept, loss=loss, tests=tests)

    def held(self, job: Job) -> Held:
        """What ``job`` has on each rank all the time."""
        units = flats_of(self.module, job.precision, job.gpus, job.autocast)
        return held([flat for unit in units for flat in unit], job.gpus, job.accumulates)

    def work(self, job: Job) -> Work:
        """What a step of ``job`` moves."""
        return work_of(self.module, job.precision, job.gpus, job.autocast, job.accumulates)

    def _live(self, job: Job, units: list[list[Flat]], inputs: dict[str, Any], keep: bool) -> tuple[int, str, int]:
        groups = [list(flat.parameters) for unit in units for flat in unit if flat.trains]
        flats = [flat for unit in units for flat in unit]
        apart = job.gpus > 1
        landing = [p for flat in flats if apart and flat.reduce == flat.wire for p in flat.parameters if lands(p)]
        with ExitStack() as stack:
            stack.enter_context(_whole())
            stack.enter_context(torch.device("meta"))
            for flat in flats:
                stack.enter_context(_in_dtype(flat))
            for block in self.blocks:
                stack.enter_context(_run_as_block(block, job.precision, keep))
            if apart:
                stack.enter_context(gradients_go(groups))
            stack.enter_context(as_on_gpu(landing, job.autocast))
            known = [p for flat in flats for p in flat.parameters]
            counted = stack.enter_context(LiveBytes([*known, *self.module.buffers(), *_tensors(inputs)]))
            loss, what = _loss(self.module(**job.precision.cast_arguments(inputs)))
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            peak = counted.peak
        for parameter in self.module.parameters():
            parameter.grad = None
        return peak + sum(tensor.nbytes for tensor in _tensors(inputs)), what, counted.tests


def estimate(factory: Callable[[], Any], job: Job) -> Estimate:
    """What training the model that ``factory`` builds takes on each rank, AdamW included.

    Nothing is computed, and no values are held: the model is built, and run once, on the device "meta".

    Raises ConfigurationError when ``factory`` makes no module, one that cannot be sharded, or inputs do not fit.
    """
    return Model(factory, job.dtype).estimate(job)


@contextmanager
def _whole() -> Iterator[None]:
    """Constructors that return inside the ``with`` do not shard, and forwards gather nothing."""
    ctx = context()
    ctx.building += 1
    try:
        yield
    finally:
        ctx.building -= 1


def _built(factory: Callable[[], Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            made = factory()
    except (NotImplementedError, RuntimeError):  # a constructor that reads values
        made = factory()
    if not isinstance(made, nn.Module):
        raise ConfigurationError(f"The factory made a {type(made).__name__}; it must return a torch.nn.Module.")
    moved: dict[int, nn.Parameter] = {}
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and not nn.parameter.is_lazy(parameter):
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
    return made.train()


@contextmanager
def _in_dtype(flat: Flat) -> Iterator[None]:
    """Parameters in the dtype in which they are gathered."""
    if flat.wire == flat.dtype:
        yield
        return
    try:
        for parameter in flat.parameters:
            parameter.data = torch.empty_like(parameter, dtype=flat.wire)
        yield
    finally:
        for parameter in flat.parameters:
            parameter.grad = None
            parameter.data = torch.empty_like(parameter, dtype=flat.dtype)


@contextmanager
def _run_as_block(block: nn.Module, precision: Precision, keep: bool) -> Iterator[None]:
    """Recompute it in the backward where it would be, and cast what it is given."""
    record, forward = record_of(block), block.forward
    assert record is not None
    policy = record.precision or precision
    recompute = record.recompute or (record.recompute is None and not keep)

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = policy.cast_arguments((args, kwargs))
        if not recompute:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    if type(block).forward is nn.Module.forward:  # a group of modules, which are called by themselves
        yield
        return
    block.__dict__["forward"] = run
    try:
        yield
    finally:
        del block.__dict__["forward"]


def _inputs(module: nn.Module, job: Job) -> dict[str, Any]:
    """Tensors for what forward needs and what was named.

    Raises ConfigurationError for names that forward does not take, and shapes that cannot be read.
    """
    wanted = inspect.signature(module.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
    unknown = [name for name in job.inputs if name not in wanted and not open_ended]
    if unknown:
        raise ConfigurationError(f"--input names {', '.join(unknown)}; forward takes {', '.join(wanted)}.")
    needed = [
        p.name for p in wanted.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    shapes = dict.fromkeys(needed, "BxT:long") | dict(job.inputs)
    return {name: _input(name, shape, job) for name, shape in shapes.items()}


def _input(name: str, shape: str, job: Job) -> torch.Tensor:
    found = re.fullmatch(r"((?:B|T|\d+)(?:x(?:B|T|\d+))*)(?::(\w+))?", shape)
    kind = found and (found[2] or "float")
    if found is None or kind not in _KINDS:
        raise ConfigurationError(
            f"--input {name}={shape}: write sizes and a kind, as in BxT:long or Bx3x224x224:float; kinds are "
            f"{', '.join(_KINDS)}."
        )
    letters = {"B": job.batch, "T": job.length}
    sizes = [letters.get(size) or int(size) for size in found[1].split("x")]
    return torch.empty(sizes, dtype=_KINDS[kind], device="meta")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _loss(out: Any) -> tuple[torch.Tensor, str]:
    """A scalar of the model's output, and which."""
    named = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if isinstance(named, torch.Tensor):
        return named, "the output's loss"
    floating = [tensor for tensor in _tensors(out) if tensor.is_floating_point() and tensor.requires_grad]
    scalars = [tensor for tensor in floating if tensor.dim() == 0]
    if scalars:
        return scalars[0], "the output"
    if not floating:
        raise ConfigurationError("The model's output has no floating tensor that depends on parameters.")
    return floating[0].float().mean(), f"the mean of the output, {tuple(floating[0].shape)}: a real one may need more"
