"""Blocks that run from recordings give what they give as they are written.

On a CPU a recording is the block itself, so that everything around it is tested: who is recorded, when, and what else
runs meanwhile.  That the device does the same again is tested on GPUs, where these tests run, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import test_memory_plan as plan
import torch
from ranks import on_ranks

import bmtrain as bmt
from bmtrain.block.graphs import Graphs
from bmtrain.block.host_time import HostTime
from bmtrain.context import context
from bmtrain.device import Memory
from bmtrain.errors import ConfigurationError

INIT: dict[str, Any] = {"schedule": "stress", "graphs": True}


def fresh(memory: Memory | None, graphs: bool) -> Any:
    """Let the process's engine forget what it has planned and recorded."""
    engine: Any = context().engine
    made = plan.fresh_plan(memory)
    engine.graphs = Graphs(context(), made, engine.first_losses) if graphs else None
    context().diary.step = 0
    return engine.graphs


def recorded(graphs: Any) -> int:
    return sum(block.is_recorded for block in graphs.blocks())


def reasons(graphs: Any) -> list[str]:
    return sorted({block.reason for block in graphs.blocks() if block.reason is not None})


def check_same(
    between: plan.Between, steps: int, precision: str, amid: plan.Amid = plan.goes_on
) -> tuple[int, list[str]]:
    """How many blocks are recorded in the end, and why others are not; numbers are those of blocks as written."""
    made: list[Any] = []
    results = []
    for graphs in (False, True):

        def forget(memory: Memory | None, graphs: bool = graphs) -> None:
            made.append(fresh(memory, graphs))

        results.append(plan.trained(plan.PLENTY, between, steps, precision, False, True, amid, forget))
    as_written, recordings = results
    assert as_written[0] == recordings[0]
    assert all(torch.equal(as_written[1][key], recordings[1][key]) for key in as_written[1])
    return recorded(made[-1]), reasons(made[-1])


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16", "fp16"])
@on_ranks(1, 2, init=INIT)
def test_recordings_change_no_number(precision: str) -> None:
    assert check_same(plan.nothing, 12, precision) == (2, [])


@pytest.mark.parametrize("between", plan.BETWEEN)
@on_ranks(1, 2, init=INIT)
def test_what_else_is_done_to_a_model_counts(between: plan.Between) -> None:
    check_same(between, 9, "autocast")


AMID = [plan.evaluates_otherwise, plan.writes_amid, plan.writes_whole_amid, plan.computes_twice]


@pytest.mark.parametrize("amid", AMID)
@on_ranks(1, 2, init=INIT)
def test_what_is_done_before_the_backward_counts(amid: plan.Amid) -> None:
    check_same(plan.nothing, 8, "autocast", amid)


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
    held = block.__dict__.setdefault("_bmt_test_held", SimpleNamespace(values=[])).values
    out = block(x)
    held.append(out.detach())
    return out + sum(value.mean() for value in held[:-1])


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
    kind: type[Plain], use: Uses, graphs: bool, compiled: bool = False
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    context().memory = "auto"
    made = fresh(plan.PLENTY, graphs)
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
    if compiled:
        bmt.compile(model, backend="aot_eager")
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
    losses = []
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
    kind, use, reason = CASES[case]
    as_written, recordings = steps_of(kind, use, False), steps_of(kind, use, True)
    # What a block asks of its input's gradient is summed before what others ask, if they do.
    near = 1e-6 if use is twice else 0.0
    torch.testing.assert_close(recordings[0], as_written[0], rtol=0, atol=near)
    torch.testing.assert_close(recordings[1], as_written[1], rtol=0, atol=near)
    found = reasons(recordings[2])
    assert not found if reason is None else len(found) == 1 and reason in found[0], found
    assert recorded(recordings[2]) == (reason is None or kind is Nests)  # of which the block inside is


@pytest.mark.parametrize("kind", [Plain, Drops, BatchNorm])
@on_ranks(1, 2, init=INIT)
def test_compiled_blocks(kind: type[Plain]) -> None:
    as_written, recordings = steps_of(kind, simply, False, True), steps_of(kind, simply, True, True)
    assert as_written[0] == recordings[0]
    torch.testing.assert_close(recordings[1], as_written[1], rtol=0, atol=0)
    assert recorded(recordings[2]) == 1


@on_ranks(1, 2, init=INIT)
def test_a_second_backward_is_refused() -> None:
    def use(block: Any, x: torch.Tensor, step: int) -> Any:
        out = block(x)
        if step == 6:
            torch.autograd.grad(out.sum(), x, retain_graph=True)
        return out

    with pytest.raises(ConfigurationError, match="a second time"):
        steps_of(Plain, use, True)


class Watch:
    """Of a forward for which the host took the first, and the device the second."""

    def __init__(self, times: tuple[float, float] | None) -> None:
        self.times = times

    def stop(self) -> None:
        pass

    def read(self) -> tuple[float, float] | None:
        return self.times


@pytest.mark.parametrize("times, said", [((0.01, 0.0101), 1), ((0.01, 0.02), 0), (None, 0)])
@on_ranks(1)
def test_a_host_that_is_the_limit_is_said_once(times: tuple[float, float] | None, said: int) -> None:
    ctx = context()
    time = HostTime(ctx)
    with pytest.MonkeyPatch.context() as patch, lines_said(patch) as lines:
        patch.setattr(ctx.device, "stopwatch", lambda: Watch(times))
        for step in range(12):
            patch.setattr(ctx.diary, "step", step)
            if time.wanted:
                time.forward_starts()
                time.forward_ends()
                time.optimizer_stepped(has_blocks=True)
    assert len(lines) == said and all("BMTRAIN_GRAPHS=1" in line for line in lines)


@contextmanager
def lines_said(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    patch.setattr("bmtrain.block.host_time.say", lines.append)
    yield lines
