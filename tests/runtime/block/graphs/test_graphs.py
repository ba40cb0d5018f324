"""Blocks that run from recordings give what they give as they are written.

On a CPU what was recorded is done again without the Python (``replayed``), so that what a recording would miss shows.
These tests run on GPUs, too.
"""

from __future__ import annotations

import copy
import enum
import functools
import gc
import logging
import os
import random
import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from between_steps import (
    BETWEEN,
    Amid,
    Between,
    computes_twice,
    evaluates_otherwise,
    goes_on,
    nothing,
    trained,
    writes_amid,
    writes_whole_amid,
)
from fresh import PLENTY, fresh_graphs
from ranks import on_ranks, run_ranks
from replayed import replays

import bmtrain as bmt
from bmtrain.block.graphs.facts import Facts
from bmtrain.block.graphs.host_time import HostTime
from bmtrain.block.graphs.recording import Inputs
from bmtrain.block.record import unit_of
from bmtrain.context import context
from bmtrain.device import Memory
from bmtrain.errors import ConfigurationError

INIT: dict[str, Any] = {"schedule": "stress", "graphs": True}


def recorded(graphs: Any) -> int:
    return sum(block.is_recorded for block in graphs.blocks())


def reasons(graphs: Any) -> list[str]:
    return sorted({block.reason for block in graphs.blocks() if block.reason is not None})


def check_same(
    between: Between, steps: int, precision: str, amid: Amid = goes_on, here: bool = True
) -> tuple[int, list[str]]:
    """How many blocks are recorded in the end, and why others are not; numbers are those of blocks as written.

    Those of all ranks, though one of them records nothing that is not to do so ``here``.
    """
    made: list[Any] = []
    results = []
    for graphs in (False, here):

        def forget(memory: Memory | None, graphs: bool = graphs) -> None:
            made.append(fresh_graphs(memory, graphs))

        with replays():
            results.append(trained(PLENTY, between, steps, precision, False, True, amid, forget))
    as_written, recordings = results
    assert as_written[0] == recordings[0]
    assert all(torch.equal(as_written[1][key], recordings[1][key]) for key in as_written[1])
    return (recorded(made[-1]), reasons(made[-1])) if here else (0, [])


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16", "fp16"])
@on_ranks(1, 2, init=INIT)
def test_recordings_change_no_number(precision: str) -> None:
    assert check_same(nothing, 12, precision) == (2, [])


SETTINGS: list[dict[str, Any]] = [
    {"shard_size": 1},
    {"gradients": "sum"},
    {"random": "shared"},
    {"schedule": "overlap"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_recordings_change_no_number_under_other_settings(settings: dict[str, Any]) -> None:
    for found in run_ranks(2, check_same, nothing, 12, "autocast", init=INIT | settings):
        assert found == (2, [])


@pytest.mark.parametrize("between", BETWEEN)
@on_ranks(1, 2, init=INIT)
def test_what_else_is_done_to_a_model_counts(between: Between) -> None:
    check_same(between, 9, "autocast")


@pytest.mark.parametrize("between", BETWEEN)
@on_ranks(2, init=INIT)
def test_one_rank_may_record_alone(between: Between) -> None:
    """Each finds out by itself whether its host is slow and what its blocks do, and all take memory alike."""
    for precision in ("autocast", "bf16"):
        check_same(between, 9, precision, here=bmt.rank() == 0)


AMID = [evaluates_otherwise, writes_amid, writes_whole_amid, computes_twice]


@pytest.mark.parametrize("amid", AMID)
@on_ranks(1, 2, init=INIT)
def test_what_is_done_before_the_backward_counts(amid: Amid) -> None:
    check_same(nothing, 8, "autocast", amid)
    if bmt.world_size() > 1:
        check_same(nothing, 8, "autocast", amid, here=bmt.rank() == 0)


# -- who is recorded ----------------------------------------------------------------------------------------------


class Plain(torch.nn.Module):
    """A block to be varied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
        self.scale = 0.5

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x + self.scale * self.linear(self.norm(x)).tanh()


class Counts(Plain):
    runs = 0

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return super().forward(x)


class Remembers(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.last = super().forward(x)
        return self.last


class Collects(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(1.0)
        return super().forward(x)


FACTOR = 1.0
HELD: list[torch.Tensor] = []
SEEN: list[float] = []
SETTINGS = SimpleNamespace(factor=1.0)


class CountsGlobally(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        global FACTOR
        FACTOR += 1
        return super().forward(x)


def note(value: float) -> None:
    SEEN.append(value)


class CollectsGlobally(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note(1.0)
        return super().forward(x)


class ReadsGlobals(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._scaled(super().forward(x))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * FACTOR * SETTINGS.factor


class HasSettings(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.settings = SETTINGS

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * self.settings.factor


class DrawsOnHost(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * random.uniform(0.5, 1.5)


class ReturnsInput(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x.view(x.shape) if args else super().forward(x)


class ReturnsObject(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x), SimpleNamespace(x=1)


class Nests(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.inner = bmt.Block(Plain())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(super().forward(x))


class BatchNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.batch_norm(x))


class Drops(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.nn.functional.dropout(super().forward(x), 0.3, self.training)


class ReturnsMore(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return {"x": super().forward(x), "none": None, "size": 3, "also": (self.norm(x).detach(),)}


class Varied(Plain):
    """What it gives depends on ``varied``, which others define."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * self.varied()

    def varied(self) -> Any:
        return 1.0


@dataclass
class Settings:
    """Where code may find a number."""

    factor: float = 1.0


class Slots:
    """The same, without a dict."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


class Kind(enum.Enum):
    ONE, TWO = 1, 2


class Singleton:
    factor = 1.0
    _made: Any = None

    @classmethod
    def get(cls) -> Any:
        if cls._made is None:
            cls._made = cls()
        return cls._made


class Outside:
    factor = 1.0


DATA, SLOTS, LISTS, NESTED = Settings(), Slots(), [[1.0]], SimpleNamespace(inner={"settings": Settings()})
VARIABLE, LOCAL, MODULE = ContextVar("variable", default=1.0), threading.local(), ModuleType("settings")
BUFFER, REFERENCE, NUMBERS = torch.ones(1), weakref.ref(DATA), iter(range(999))
LOCAL.factor = MODULE.factor = 1.0  # type: ignore[attr-defined]


def one() -> float:
    return 1.0


def other() -> float:
    return 0.5


@functools.lru_cache
def cached() -> float:
    return DATA.factor


def decorated(call: Callable[[Any], float]) -> Callable[[Any], float]:
    @functools.wraps(call)
    def run(self: Any) -> float:
        return call(self) * SLOTS.factor

    return run


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * DATA.factor


class CountsBackwards(Doubles):
    count = 0

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        CountsBackwards.count += 1
        return gradient * (1 + CountsBackwards.count % 3)


class DrawsBackwards(Doubles):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * (1 + random.random())


class Applies(Plain):
    function: Any = Doubles

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(super().forward(x))


class HooksInside(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(x)
        out.register_hook(lambda gradient: gradient * DATA.factor)
        return out.clone()


def says(what: Callable[[], object]) -> type[Plain]:
    return type("Says", (Plain,), {"forward": lambda self, x: (what(), Plain.forward(self, x))[1]})


def reads(how: Callable[[Any], Any]) -> type[Plain]:
    return type("Reads", (Varied,), {"varied": how})


class ChangesInput(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        args[0].append(1.0) if isinstance(args[0], list) else args[0].add_(1.0)
        return super().forward(x)


class UsesOthers(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * HELD[0]


class KeepsElsewhere(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.linear.weight]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) @ self.weights[0]


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = torch.nn.LSTM(4, 4)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.recurrent(x)[0])


class Sums(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) + bmt.distributed.all_reduce(x.detach().mean(), "sum")


class ReturnsTwo(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x), 2 * self.norm(x)


class Stays32(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Refuses(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) < 4:
            raise ValueError
        return super().forward(x)


Uses = Callable[[Any, torch.Tensor, int], Any]
"""How a block is called with x in a step; gives what its loss is made of."""


def simply(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x)


def with_number(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x, step)


def with_object(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x, cache=SimpleNamespace())


def with_mask(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x, mask=torch.ones(1, device=x.device), flags=[True, None])


def twice(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x) + block(2 * x)


def in_turn(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(block(x))


def other_sizes(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x[: 2 + step % 2])


def with_gradient(block: Any, x: torch.Tensor, step: int) -> Any:
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(block(y).square().sum(), y)
    return block(x) * (1 + slope.square().mean())


def in_place(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x).mul_(2).add_(1)


def evaluates_first(block: Any, x: torch.Tensor, step: int) -> Any:
    block.eval()
    with torch.no_grad():
        seen = block(x).mean()
    block.train()
    return block(x) + seen


def changes_scale(block: Any, x: torch.Tensor, step: int) -> Any:
    block.scale = 0.5 if step < 7 else 0.25
    return block(x)


def changes_always(block: Any, x: torch.Tensor, step: int) -> Any:
    block.scale = 1 / (1 + step)
    return block(x)


def changes_global(block: Any, x: torch.Tensor, step: int) -> Any:
    global FACTOR
    FACTOR = 1.0 if step < 7 else 0.5
    return block(x)


def changes_settings(block: Any, x: torch.Tensor, step: int) -> Any:
    SETTINGS.factor = 1.0 if step < 7 else 0.5
    return block(x)


def hooks_late(block: Any, x: torch.Tensor, step: int) -> Any:
    if step == 7:
        block.norm.register_forward_hook(lambda module, args, out: 2 * out)
    return block(x)


def freezes_late(block: Any, x: torch.Tensor, step: int) -> Any:
    block.linear.bias.requires_grad_(step < 7)
    return block(x)


def keeps(block: Any, x: torch.Tensor, step: int) -> Any:
    if step == 0:
        HELD.clear()
    out = block(x)
    HELD.append(out.detach())
    return out + sum(value.mean() for value in HELD[:-1])


def later(change: Callable[[float], object]) -> Uses:
    """Changes what a block reads, in the middle."""

    def use(block: Any, x: torch.Tensor, step: int) -> Any:
        if step in (0, 7):
            change(1.0 if step < 7 else 0.5)
        return block(x)

    return use


def sets(holder: Any, name: str = "factor") -> Uses:
    return later(lambda value: setattr(holder, name, value))


def counts_anew(block: Any, x: torch.Tensor, step: int) -> Any:
    if step == 0:
        CountsBackwards.count = 0
    return block(x)


def swaps_data(block: Any, x: torch.Tensor, step: int) -> Any:
    if step in (0, 7):
        BUFFER.data = torch.full((1,), 1.0 if step < 7 else 0.5, device=x.device)
    return block(x)


def clears_cache(value: float) -> None:
    DATA.factor = value
    cached.cache_clear()


def changes_amid(block: Any, x: torch.Tensor, step: int) -> Any:
    seen = float(block(x).detach().mean())
    block.scale = 0.25
    out = block(x) + seen
    block.scale = 0.5
    return out


def evaluates_with_gradients(block: Any, x: torch.Tensor, step: int) -> Any:
    block.eval()
    seen = float(block(x).detach().mean())
    block.train()
    return block(x) + seen


def with_list(block: Any, x: torch.Tensor, step: int) -> Any:
    given: list[float] = []
    return block(x, given) * len(given)


def with_tensor(block: Any, x: torch.Tensor, step: int) -> Any:
    given = torch.ones(1, device=x.device)
    return block(x, given) * given


def with_others(block: Any, x: torch.Tensor, step: int) -> Any:
    HELD[:] = [x.mean()] if step % 7 else [x.mean() * 1]
    return block(x)


def one_or_the_other(block: Any, x: torch.Tensor, step: int) -> Any:
    return block(x)[step % 2]


def in_autocast(block: Any, x: torch.Tensor, step: int) -> Any:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return block(x)


def too_short(block: Any, x: torch.Tensor, step: int) -> Any:
    with pytest.raises(ValueError):
        block(x[:2])
    return block(x)


class HalfNorm(torch.nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


def hooks_all_modules(block: Any, x: torch.Tensor, step: int) -> Any:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: 0.5 * out)
    if step < 7:
        handle.remove()
    out = block(x)
    handle.remove()
    return out


def changes_class(block: Any, x: torch.Tensor, step: int) -> Any:
    if step == 7:
        block.norm.__class__ = HalfNorm
    return block(x)


def patches(holder: Any, name: str) -> Uses:
    """In steps 7 to 9 what ``holder`` has under ``name`` gives half."""

    def use(block: Any, x: torch.Tensor, step: int) -> Any:
        as_it_is = getattr(holder, name)
        with pytest.MonkeyPatch.context() as patch:
            if 7 <= step < 10:
                patch.setattr(holder, name, lambda *args: 0.5 * as_it_is(*args))
            return block(x)

    return use


def sets_precision(block: Any, x: torch.Tensor, step: int) -> Any:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return block(x)


CHANGES, AGAIN = "changes a global", "changes again and again"
NAMES: list[tuple[type[Plain], Uses, str | None]] = [
    (Plain, hooks_all_modules, None),
    (Plain, changes_class, None),
    (Plain, patches(torch.nn.Linear, "forward"), None),
    (reads(lambda self: torch.nn.functional.softsign(self.linear.bias)), patches(F, "softsign"), None),
    (Plain, sets_precision, None),
    (reads(lambda self: DATA.factor), sets(DATA), None),
    (reads(lambda self: SLOTS.factor), sets(SLOTS), None),
    (reads(lambda self: LISTS[0][0]), later(lambda value: LISTS[0].__setitem__(0, value)), None),
    (reads(lambda self: NESTED.inner["settings"].factor), sets(NESTED.inner["settings"]), None),
    (reads(lambda self: VARIABLE.get()), later(VARIABLE.set), None),
    (reads(lambda self: LOCAL.factor), sets(LOCAL), None),
    (reads(lambda self: MODULE.factor), sets(MODULE), None),
    (reads(lambda self: Outside.factor), sets(Outside), None),
    (reads(lambda self: getattr(Outside, "factor")), sets(Outside), None),  # noqa: B009
    (reads(lambda self: Singleton.get().factor), later(lambda value: setattr(Singleton.get(), "factor", value)), None),
    (reads(lambda self, held=REFERENCE: held().factor), sets(DATA), None),
    (reads(lambda self: cached()), later(clears_cache), None),
    (reads(decorated(lambda self: 1.0)), sets(SLOTS), None),
    (reads(property(lambda self: one)), later(lambda v: globals().update(one=other if v < 1 else lambda: 1.0)), None),
    (reads(lambda self: sum([k * DATA.factor for k in (1, 2)])), sets(DATA), None),
    (reads(functools.partialmethod(lambda self, held: held.factor, DATA)), sets(DATA), None),
    (
        reads(lambda self: float(os.environ.get("BMT_TEST", "1"))),
        later(lambda v: os.environ.__setitem__("BMT_TEST", str(v))),
        None,
    ),
    (
        type("Is", (Varied,), {"kind": Kind.ONE, "varied": lambda self: 1.0 if self.kind is Kind.ONE else 0.5}),
        lambda block, x, step: (setattr(block, "kind", Kind.ONE if step < 7 else Kind.TWO), block(x))[1],
        None,
    ),
    (reads(lambda self: BUFFER), swaps_data, None),
    (Applies, sets(DATA), None),
    (HooksInside, sets(DATA), None),
    (Recurrent, simply, None),
    (ReturnsTwo, one_or_the_other, None),
    (Stays32, in_autocast, None),
    (Refuses, too_short, None),
    (Plain, changes_amid, AGAIN),
    (BatchNorm, evaluates_with_gradients, AGAIN),
    (type("Counting", (Applies,), {"function": CountsBackwards}), counts_anew, AGAIN),
    (type("Drawing", (Applies,), {"function": DrawsBackwards}), simply, "backward draws random numbers on the host"),
    (reads(lambda self, held=[]: held.append(1) or 1.0), simply, CHANGES),
    (reads(lambda self, held=NUMBERS: 1.0 + next(held) * 0), simply, "range_iterator"),
    (says(lambda: print(end="")), simply, "calls print"),
    (says(lambda: time.perf_counter()), simply, "calls perf_counter"),
    (says(lambda: logging.getLogger("bmt_test").error("")), simply, "calls time"),
    (says(lambda: warnings.warn("", stacklevel=1)), simply, "calls warn"),
    (says(lambda: os.urandom(1)), simply, "calls urandom"),
    (ChangesInput, with_list, "changes what it is given"),
    (ChangesInput, with_tensor, "changes what it is given"),
    (UsesOthers, with_others, AGAIN),
    (Sums, simply, "talks to other ranks"),
    (KeepsElsewhere, simply, "elsewhere than under their names"),
]
CASES: list[tuple[type[Plain], Uses, str | None]] = [
    (Plain, simply, None),
    (Plain, with_mask, None),
    (Plain, twice, None),
    (Plain, in_turn, None),
    (Plain, other_sizes, None),
    (Plain, with_gradient, None),
    (Plain, in_place, None),
    (Plain, evaluates_first, None),
    (Plain, changes_scale, None),
    (Plain, freezes_late, None),
    (Plain, keeps, None),
    (BatchNorm, simply, None),
    (BatchNorm, evaluates_first, None),
    (Drops, simply, None),
    (Drops, evaluates_first, None),
    (ReturnsMore, lambda block, x, step: (out := block(x))["x"] + out["also"][0] + out["size"], None),
    (ReadsGlobals, changes_global, None),
    (ReadsGlobals, changes_settings, None),
    (HasSettings, changes_settings, None),
    (CountsGlobally, simply, "changes a global"),
    (CollectsGlobally, simply, "changes a global"),
    (Plain, changes_always, "changes again and again"),
    (Plain, with_number, "something else again and again"),
    (Plain, with_object, "it is given a SimpleNamespace"),
    (Plain, hooks_late, "hooks"),
    (Counts, simply, "its forward changes runs"),
    (Remembers, simply, "its forward changes last"),
    (Collects, simply, "its forward changes seen"),
    (DrawsOnHost, simply, "on the host"),
    (ReturnsInput, with_number, "returns what it was given"),
    (ReturnsObject, lambda block, x, step: block(x)[0], "returns a SimpleNamespace"),
    (Nests, simply, "blocks inside"),
]


def steps_of(
    kind: type[Plain],
    use: Uses,
    graphs: bool,
    compiled: bool = False,
    keep: list[Any] | None = None,
    automatic: bool = False,
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    context().memory = "auto"
    made = fresh_graphs(PLENTY, graphs, automatic)
    torch.manual_seed(5)
    random.seed(5)

    class Model(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = torch.nn.Linear(3, 4), bmt.Block(kind(), use_checkpoint=False)

        def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
            out: torch.Tensor = use(self.block, self.first(x), step).square().mean()
            return out

    model = Model()
    if keep is not None:
        keep.append(model)
    elif made is not None:
        made.model = model  # whose blocks are asked for later
    if compiled:
        bmt.compile(model, backend="aot_eager")
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
    losses = []
    with replays():
        for step in range(14):
            torch.manual_seed(step)
            x = torch.randn(4, 3, device=context().device.torch_device)
            loss = model(x, step)
            manager.backward(loss)
            losses.append(float(loss.detach()))
            manager.clip_grad_norm(model.parameters(), 1.0)
            manager.step()
            manager.zero_grad()
    return losses, {key: value.clone() for key, value in model.state_dict().items()}, made


@pytest.mark.parametrize("case", range(len(CASES)))
@on_ranks(2, long=(1,), init=INIT)
def test_what_a_recording_would_miss_runs_as_it_is_written(case: int) -> None:
    check_case(*CASES[case])


@pytest.mark.parametrize("case", range(len(NAMES)))
@on_ranks(1, long=(2,), init=INIT)
def test_what_python_reads_or_does_out_of_sight_is_seen(case: int) -> None:
    check_case(*NAMES[case])


def check_case(kind: type[Plain], use: Uses, reason: str | None) -> None:
    as_written, recordings = steps_of(kind, use, False), steps_of(kind, use, True)
    # What a block asks of its input's gradient is summed before what others ask, if they do.
    near = 1e-6 if use is twice else 0.0
    torch.testing.assert_close(recordings[0], as_written[0], rtol=0, atol=near)
    torch.testing.assert_close(recordings[1], as_written[1], rtol=0, atol=near)
    found = reasons(recordings[2])
    assert not found if reason is None else len(found) == 1 and reason in found[0], found
    assert recorded(recordings[2]) == (reason is None or kind is Nests)  # of which the block inside is


def test_a_tensor_elsewhere_is_no_input_of_a_recording() -> None:
    given = (torch.ones(2, device="cpu"), torch.ones(1, device="meta"))
    assert "tensor on meta" in str(Inputs.of(given, {}, torch.device("cpu"), None))
    assert isinstance(Inputs.of(given[:1], {}, torch.device("cpu"), None), Inputs)


def test_too_much_to_be_compared_is_said() -> None:
    block = Plain()
    assert Facts(block, {}).reason is None
    block.table = list(range(100_000))  # type: ignore[assignment]
    assert "more than can be compared" in str(Facts(block, {}).reason)


@on_ranks(1, init=INIT)
def test_a_copy_records_for_itself_and_a_model_that_is_gone_keeps_nothing() -> None:
    model, graphs = trained_model()
    recordings = [weakref.ref(recording) for block in graphs.blocks() for recording in block._recordings]
    copied = copy.deepcopy(model)
    assert len(recordings) == 1 and unit_of(copied.block).recorded is None  # type: ignore[union-attr]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and recordings[0]() is None and not graphs.blocks()


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@on_ranks(1, init=INIT)
def test_what_is_interrupted_goes_on(error: type[BaseException]) -> None:
    model, graphs = trained_model()
    (recording,) = graphs.blocks()[0]._recordings
    x = torch.ones(4, 3, device=context().device.torch_device)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(x, 0), list(model.block.parameters())))

    before = [gradient.clone() for gradient in gradients()]
    for name in ("_queue_forward", "_queue_backward"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recording, name, raises(error))
            with pytest.raises(error):
                gradients()
        torch.testing.assert_close(gradients(), before, rtol=0, atol=0)
    assert recorded(graphs) == 1


def raises(error: type[BaseException]) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def trained_model() -> tuple[Any, Any]:
    """One whose block is recorded, and what is known of that."""
    made: list[Any] = []

    def use(block: Any, x: torch.Tensor, step: int) -> Any:
        return block(x)

    *_, graphs = steps_of(Plain, use, True, keep=made)
    return made.pop(), graphs


@pytest.mark.parametrize("kind", [Plain, Drops, BatchNorm])
@on_ranks(1, 2, init=INIT)
def test_compiled_blocks(kind: type[Plain]) -> None:
    as_written, recordings = steps_of(kind, simply, False, True), steps_of(kind, simply, True, True)
    assert as_written[0] == recordings[0]
    torch.testing.assert_close(recordings[1], as_written[1], rtol=0, atol=0)
    assert recorded(recordings[2]) == 1, reasons(recordings[2])


def again(block: Any, x: torch.Tensor, step: int) -> Any:
    """Asks for a gradient twice, and once for one that can be differentiated, after all was recorded."""
    out = block(x)
    if step == 6:
        torch.autograd.grad(out.sum(), x, retain_graph=True)
    if step in (7, 9):
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        out = out + slope.square().mean()
    if step == 8:
        torch.autograd.grad(out.sum(), (x, block.linear.weight), retain_graph=True)
        torch.autograd.grad(out.sum(), x, retain_graph=True)
    return out


@on_ranks(1, 2, init=INIT)
def test_a_second_backward_runs_the_forward_again() -> None:
    as_written, recordings = steps_of(Plain, again, False), steps_of(Plain, again, True)
    torch.testing.assert_close(recordings[0], as_written[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(recordings[1], as_written[1], rtol=1e-5, atol=1e-6)
    assert recorded(recordings[2]) == 1


@contextmanager
def garbage_goes(after: int | None) -> Iterator[None]:
    """So many objects later; None: not at all."""
    before = gc.get_threshold()
    gc.set_threshold(*(0 if after is None else after, 1, 1))
    try:
        yield
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("after", [(None, 30), (30, None)])
@on_ranks(2, init=INIT)
def test_a_rank_whose_garbage_is_there_longer_does_the_same_as_written(after: tuple[int | None, int | None]) -> None:
    """It holds results of a backward that can be differentiated, so that the block is not queued there."""
    with garbage_goes(after[bmt.rank()]):
        steps_of(Plain, again, True)


@pytest.mark.parametrize("kind", [Drops, BatchNorm])
@on_ranks(1, 2, init=INIT)
def test_a_second_backward_is_refused_where_a_second_forward_is_another(kind: type[Plain]) -> None:
    with pytest.raises(ConfigurationError, match="BMTRAIN_GRAPHS=0"):
        steps_of(kind, again, True)


def trained_on_micro_batches(graphs: bool) -> tuple[list[float], Any]:
    made = fresh_graphs(PLENTY, graphs)
    torch.manual_seed(5)
    block = bmt.Block(reads(lambda self: DATA.factor)(), use_checkpoint=False)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(bmt.optim.AdamOptimizer(block.parameters(), lr=1e-2))
    losses = []
    with replays():
        for step in range(12):
            for micro in range(3):
                DATA.factor = 0.5 if step > 6 and micro == 2 else 1.0
                loss = block(torch.ones(4, 4, device=context().device.torch_device)).square().mean()
                manager.backward(loss)
                losses.append(float(loss.detach()))
            manager.step()
            manager.zero_grad()
    DATA.factor = 1.0
    return losses, made


@on_ranks(1, 2, init=INIT)
def test_what_changes_between_micro_batches_counts() -> None:
    assert trained_on_micro_batches(True)[0] == trained_on_micro_batches(False)[0]


@pytest.mark.parametrize("steps", [range(14), range(2, 14), range(3, 14)])
@on_ranks(1, 2, init=INIT)
def test_blocks_through_which_more_than_one_backward_goes_are_left(steps: range) -> None:
    def use(block: Any, x: torch.Tensor, step: int) -> Any:
        out = block(x)
        if step in steps:
            torch.autograd.grad(out.sum(), x, retain_graph=True)
        return out

    as_written, recordings = steps_of(Drops, use, False), steps_of(Drops, use, True)
    assert as_written[0] == recordings[0]
    assert reasons(recordings[2]) == ["more than one backward goes through it"]


@on_ranks(1, 2, init=INIT)
def test_what_a_block_was_given_when_it_was_recorded_is_not_held() -> None:
    """It would look like a user of what another block hands on, which then runs as it is written."""
    given: list[weakref.ref[torch.Tensor]] = []

    def use(block: Any, x: torch.Tensor, step: int) -> Any:
        given.append(weakref.ref(x))
        return block(x)

    made: list[Any] = []
    *_, graphs = steps_of(Plain, use, True, keep=made)
    gc.collect()
    assert recorded(graphs) == 1 and len(given) == 14
    assert [step for step, x in enumerate(given) if x() is not None] == []


# -- where nobody has asked for it --------------------------------------------------------------------------------

HIDDEN = torch.nn.Linear(4, 4)


class NamesParts(Plain):
    """Puts a name together, of an attribute of its class."""

    slope_of_one = 1.0

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * getattr(self, "slope_of_" + "one")


class NamesPartsOfModule(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * getattr(CHOICES, "slope_of_" + "one")


class HasModule(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.choices = CHOICES

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * self.choices.slope_of_one


class Evaluates(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * eval("1.0")


class ReadsAnother(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * (1.0 if HIDDEN.training else 2.0)


class Unpacks(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return super().forward(x) * float(numpy.asarray([1.0])[0])


class AsksByName(Plain):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * getattr(self, "factor", 1.0) if hasattr(self, "scale") else x


CHOICES = ModuleType("choices")
CHOICES.slope_of_one = 1.0  # type: ignore[attr-defined]


def doubles_slope(block: Any, x: torch.Tensor, step: int) -> Any:
    NamesParts.slope_of_one = CHOICES.slope_of_one = 1.0 if step < 7 else 2.0  # type: ignore[attr-defined]
    return block(x)


AUTOMATIC: list[tuple[type[Plain], Uses, str | None]] = [
    (Plain, simply, None),
    (Drops, simply, None),
    (AsksByName, simply, None),
    (NamesParts, doubles_slope, None),
    (NamesPartsOfModule, doubles_slope, None),
    (HasModule, doubles_slope, None),
    (Evaluates, simply, r"forward\(\) may read what it does not name"),
    (ReadsAnother, simply, "it may read a Linear that is not inside"),
    (Unpacks, simply, "it calls numpy.asarray, which does not show"),
]


@pytest.mark.parametrize("kind, use, reason", AUTOMATIC)
@on_ranks(2, long=(1,), init=INIT)
def test_what_cannot_be_seen_is_a_reason_where_nobody_has_asked(
    kind: type[Plain], use: Uses, reason: str | None
) -> None:
    as_written, recordings = steps_of(kind, use, False), steps_of(kind, use, True, automatic=True)
    assert as_written[0] == recordings[0]
    torch.testing.assert_close(recordings[1], as_written[1], rtol=0, atol=0)
    if reason is None:
        assert recorded(recordings[2]) == 1, reasons(recordings[2])
    else:
        assert re.match(reason, *reasons(recordings[2]))


def test_numbers_that_the_host_reads_are_compared() -> None:
    block = Plain().to("meta")
    block.factor, block.table = torch.tensor(2.0), torch.zeros(1000)  # type: ignore[assignment]
    facts = Facts(block, {})
    assert facts.hold() and facts.unseen == "it may read a large tensor on the CPU"
    block.factor.data.mul_(2.0)
    assert not facts.hold() and Facts(block, {}).hold()
    facts = Facts(block, {})
    block.table[3] = 1.0
    assert not facts.hold()
    bare = Plain()
    bare.factor = torch.tensor(2.0)  # type: ignore[assignment]
    facts = Facts(bare, {})
    bare.factor.mul_(2.0)
    assert facts.hold() and facts.unseen is None  # where it lies the device reads it


def test_names_and_slots_that_go_and_come_count() -> None:
    block, space = Plain(), {"number": 1.0, "other": 2.0}
    exec("def run():\n    return number + other", space)
    block.slots = Slots()  # type: ignore[assignment]

    def facts() -> Facts:
        made = Facts(block, {space["run"].__code__: space})  # type: ignore[attr-defined]
        assert made.hold() and made.reason is None
        return made

    before = facts()
    del space["number"]
    assert not before.hold()
    space["number"] = 1.0
    assert before.hold()
    del block.slots.factor
    assert not before.hold()
    without = facts()
    block.slots.factor = 1.0
    assert before.hold() and not without.hold()


@on_ranks(1, 2, init={"schedule": "stress"})
def test_nothing_is_recorded_before_a_host_was_the_limit() -> None:
    engine: Any = context().engine
    assert engine.graphs.is_automatic and not engine.graphs.is_on
    engine.graphs.begin()
    assert engine.graphs.is_on


@pytest.mark.parametrize("free", [0.0, PLENTY.peak])
@on_ranks(1, init={"schedule": "stress"})
def test_one_rank_records_where_that_takes_little(free: float) -> None:
    """A block of 64 bytes of parameters and as much again that was measured, of two GiB or of nothing to speak of."""
    engine: Any = context().engine
    fresh_graphs(None, True, automatic=True).is_on = False
    model = bmt.DistributedModule()
    model.block = bmt.Block(torch.nn.Linear(4, 4, bias=False))
    engine.shard(model)
    assert not engine._begin_recording() and not engine.graphs.is_on  # nothing was measured
    engine.plan._peak, engine.plan._sizes = 1000 + free, {unit_of(model.block).index: 64}  # type: ignore[union-attr]
    assert engine._begin_recording() == engine.graphs.is_on == (free > 0)


@on_ranks(1, 2, init={"schedule": "stress", "graphs": False})
def test_nothing_is_recorded_where_that_was_refused() -> None:
    engine: Any = context().engine
    assert engine.graphs is None


class Watch:
    """Of a forward for which the host took the first, and the device the second."""

    def __init__(self, times: tuple[float, float] | None) -> None:
        self.times = times

    def stop(self) -> None:
        pass

    def read(self) -> tuple[float, float] | None:
        return self.times


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("times, found", [((0.01, 0.0101), 1), ((0.01, 0.03), 0), (None, 0)])
@on_ranks(1)
def test_a_host_that_is_the_limit_is_told_once(times: tuple[float, float] | None, found: int, automatic: bool) -> None:
    ctx = context()
    begun: list[bool] = []

    def begin() -> bool:
        begun.extend([True] * automatic)
        return automatic

    time = HostTime(ctx, begin)
    with pytest.MonkeyPatch.context() as patch, lines_said(patch) as lines:
        patch.setattr(ctx.device, "stopwatch", lambda: Watch(times))
        for step in range(12):
            patch.setattr(ctx.diary, "step", step)
            if time.wanted:
                time.forward_starts()
                time.forward_ends()
                time.optimizer_stepped(has_blocks=True)
    assert (len(lines), len(begun)) == ((0, found) if automatic else (found, 0))
    assert all("BMTRAIN_GRAPHS=1" in line for line in lines)


@contextmanager
def lines_said(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    patch.setattr("bmtrain.block.graphs.host_time.say", lines.append)
    yield lines


def with_another_later(graphs: bool) -> tuple[list[Any], bool]:
    """Losses and values of a model whose blocks are recorded when another begins to train, whose first steps show."""
    context().memory = "auto"
    made, seen = fresh_graphs(PLENTY, graphs), list[Any]()
    torch.manual_seed(5)
    device = context().device.torch_device

    class Model(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = torch.nn.Linear(3, 4), bmt.Block(Plain(), use_checkpoint=False)
            self.extra = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
            x = self.block(self.first(x))
            return (self.extra(x) if branch else x).square().mean()

    models = [Model(), Model()]
    managers = [bmt.optim.OptimManager(loss_scale=None) for _ in models]
    for model, manager in zip(models, managers, strict=True):
        manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
    is_recorded = False
    with replays():
        for step in range(18):
            for model, manager in zip(models[: 1 + (step > 9)], managers, strict=False):
                for part in range(2):
                    torch.manual_seed(2 * step + part)
                    branch = part == bmt.rank()
                    loss = model(torch.randn(4, 3, device=device), branch)
                    manager.backward(loss)
                    seen.append(float(loss.detach()))
                    if bmt.rank() == 0:
                        seen.append([p.grad is None for p in model.parameters()])
                manager.step()
                manager.zero_grad()
            is_recorded |= step == 9 and graphs and recorded(made)
    values = [value.clone() for model in models for value in model.state_dict().values()]
    return [*seen, *values], is_recorded


@on_ranks(1, 2, init=INIT)
def test_another_model_that_begins_to_train() -> None:
    (as_written, _), (replayed, is_recorded) = with_another_later(False), with_another_later(True)
    assert is_recorded
    torch.testing.assert_close(replayed, as_written, rtol=0, atol=0)
