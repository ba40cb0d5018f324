"""Models that come and go in one process: ranks collect garbage at other moments, and still do the same."""

from __future__ import annotations

import copy
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import models
import oracle
import pytest
import torch
from between_steps import units_of
from fresh import PLENTY, fresh_plan, memory_of
from models import tied
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.frame import Frame
from bmtrain.context import context
from bmtrain.objects import allgather_objects


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(oracle.WIDTH, oracle.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.lin(x))


class Net(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.Block(Layer()) for _ in range(depth)])
        self.head = nn.Linear(oracle.WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def wrapped(depth: int = 2) -> Any:
    return tied(bmt.BMTrainModelWrapper(Net(depth)))


def managed(model: Any, kind: str = "ours", **options: Any) -> bmt.optim.OptimManager:
    manager = bmt.optim.OptimManager(**options)
    make: Any = {"ours": bmt.optim.AdamOptimizer, "sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}[kind]
    manager.add_optimizer(make(model.parameters(), lr=0.01))
    return manager


def train(run: Callable[[torch.Tensor], torch.Tensor], manager: bmt.optim.OptimManager, steps: int = 2) -> None:
    for step in range(steps):
        manager.zero_grad()
        manager.backward(oracle.mean(run(models.share(oracle.inputs(step)))))
        manager.step()


@contextmanager
def garbage() -> Iterator[Callable[[], None]]:
    """What is called inside collects on rank 1 alone."""
    gc.collect()
    gc.disable()
    try:
        yield lambda: None if bmt.rank() != 1 else [gc.collect(), None][1]
    finally:
        gc.enable()


@on_ranks(2, 3)
def test_what_a_step_ran_is_compared_where_all_ranks_have_it() -> None:
    with garbage() as collect:
        model = wrapped()
        manager = managed(model, compare_every=1)
        for step in range(3):
            manager.zero_grad()
            x = models.share(oracle.inputs(step))
            probe = tied(copy.deepcopy(model))
            probe(x)
            manager.backward(oracle.mean(model(x)))
            del probe
            collect()
            manager.step()


@on_ranks(2, 3)
def test_where_infinity_began_is_found_though_a_model_is_gone() -> None:
    with garbage() as collect:
        model = wrapped()
        manager = managed(model)
        probe = tied(copy.deepcopy(model))
        probe(models.share(oracle.inputs(0)))
        del probe
        collect()
        x = models.share(oracle.inputs(0))
        manager.backward(oracle.mean(model(x * float("inf"))))
        with pytest.raises(bmt.errors.NonFiniteError, match="It began on rank 0"):
            manager.step()
            manager.step()


@on_ranks(2)
def test_buffers_of_copies_are_compared() -> None:
    """Copies that come and go may lie where others lay on some ranks."""
    with garbage() as collect, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = wrapped()
        model.register_buffer("seen", torch.zeros(1))
        for step in range(3):
            one = tied(copy.deepcopy(model))
            one.seen.fill_(bmt.rank() if step == 2 else 0)
            manager = managed(one, "sgd")
            train(one, manager, 1 if step < 2 else 3)  # whose buffers are compared at its third step
            if step < 2:
                del one, manager
            collect()
    found = [str(w.message) for w in caught if "different buffers" in str(w.message)]
    assert len(found) == (bmt.rank() == 0), found


class Taught(nn.Module):
    """A student beside a part that comes anew now and then: as a whole, or one of its layers alone."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.net, self.teacher = tied(Net()), tied(Net())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.net(x)
        with torch.no_grad():
            aim = self.teacher(x)
        return out + (self.net(x) - aim).square()  # type: ignore[no-any-return]

    def renew(self) -> None:
        if self.part == "teacher":
            self.teacher = tied(copy.deepcopy(self.net))
        elif self.part == "layer":
            self.net.layers[1] = tied(copy.deepcopy(self.net.layers[0]))
        else:
            self.net = tied(copy.deepcopy(self.net))


@pytest.mark.parametrize("part", ["teacher", "layer", "net"])
@on_ranks(2, 3, init={"schedule": "stress"})
def test_what_used_to_come_next_may_be_gone(part: str) -> None:
    """On the ranks that have collected it; on others it is still there to be gathered ahead of its time."""
    with garbage() as collect:
        model: Any = bmt.BMTrainModelWrapper(Taught(part))
        for _ in range(4):
            manager = managed(model, "sgd")
            train(model, manager, 2)
            model.renew()
            del manager
            collect()


class Lends(nn.Module):
    """Blocks of one weight, which two of them borrow; a root that gives its own to a block."""

    def __init__(self, gives: bool) -> None:
        super().__init__()
        layers = [Gated() if gives else Layer() for _ in range(3)]
        if not gives:
            layers[1].lin.weight = layers[0].lin.weight
        self.layers = nn.ModuleList([bmt.Block(layer, use_checkpoint=False) for layer in layers])
        self.gate = nn.Parameter(torch.ones(1, oracle.WIDTH)) if gives else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if self.gate is None else layer(x, self.gate.expand_as(x))
        return x


class Gated(Layer):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x + torch.tanh(self.lin(x)) * gate


@pytest.mark.parametrize("gives", [False, True])
@on_ranks(2, 3, init={"schedule": "stress"})
def test_what_stays_is_used_alike_beside_garbage(gives: bool) -> None:
    """Where all that there is stays, less is looked at; a model that is gone elsewhere does not stay here."""
    fresh_plan(PLENTY)
    with garbage() as collect:
        model: Any = bmt.BMTrainModelWrapper(Lends(gives))
        manager = managed(model, "sgd")
        train(model, manager, 4)
        probe = tied(copy.deepcopy(model))
        with torch.no_grad():
            probe(models.share(oracle.inputs(0)))
        del probe
        collect()
        train(model, manager, 3)
        assert len(set(allgather_objects(context().engine.schedule.trace._count))) == 1  # type: ignore[attr-defined]
        model.state_dict()
    fresh_plan(None)


@pytest.mark.parametrize("depth", [2, 5])
@on_ranks(2, init={"schedule": "stress"})
def test_what_stays_of_a_model_that_is_gone_is_given_up_alike(depth: int) -> None:
    """Some ranks have its buffers still, and would take the next from them."""
    plan = fresh_plan(memory_of(4))
    with garbage() as collect:
        first = wrapped(depth)
        train(first, managed(first, "sgd"), 4)
        assert all(unit.stays for unit in units_of(first))
        second = wrapped(3)
        manager = managed(second, "sgd")
        train(second, manager, 1)
        del first
        collect()
        train(lambda x: second(x.repeat(400, 1)).reshape(400, *x.shape[:-1], -1).mean(0), manager, 2)
        assert not plan._staying
        train(second, manager, 2)
        second.state_dict()
    fresh_plan(None)


@on_ranks(2, init={"schedule": "stress"})
def test_an_average_that_comes_anew() -> None:
    """Step by step, outside of any forward: what used to be multiplied next may be gone."""
    with garbage() as collect:
        model = wrapped()
        manager = managed(model, "sgd")
        for step in range(6):
            train(model, manager, 1)
            if step % 2 == 0:
                average = tied(copy.deepcopy(model))
                collect()
            for mine, other in zip(average.parameters(), model.parameters(), strict=True):
                assert torch.isfinite(mine @ other.T if mine.dim() == 2 else mine * other).all()


@pytest.mark.parametrize("kind", ["ours", pytest.param("sgd", marks=pytest.mark.long), "adafactor"])
@on_ranks(2)
def test_a_sweep(kind: str) -> None:
    """Models of other shapes, one after the other; their garbage is collected at any moment of the next one's."""
    random.seed(bmt.rank())
    with garbage() as collect:
        for size in range(12):
            model = wrapped(depth=1 + size % 3)
            manager = managed(model, kind, compare_every=2)
            head = nn.Linear(3, 3)
            manager.add_optimizer(torch.optim.SGD(head.parameters(), lr=0.1))

            def run(x: torch.Tensor, model: Any = model, head: Any = head) -> torch.Tensor:
                if random.random() < 0.3:
                    collect()
                out = head(model(x))
                out.register_hook(lambda grad: collect() if random.random() < 0.3 else None)
                return out  # type: ignore[no-any-return]

            train(run, manager, 3)
            model.state_dict()
            manager.state_dict()
            model.__dict__["manager"] = manager
            del model, manager, head, run


class Unused(nn.Module):
    """Saves its own results (tanh, softmax, exp), of which some have no part in what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(oracle.WIDTH, oracle.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lin(x)
        y.softmax(-1)
        return x + torch.tanh(y) * y.sigmoid().exp()


def frames_left(step: Callable[[Any, torch.Tensor], object], recompute: bool) -> list[int]:
    """How many forwards are remembered after four, eight and twelve steps."""
    net = nn.Sequential(*[bmt.Block(Unused(), use_checkpoint=recompute) for _ in range(3)], Unused())
    model: Any = bmt.BMTrainModelWrapper(net)
    left = []
    for _ in range(3):
        for n in range(4):
            step(model, models.share(oracle.inputs(n)))
        gc.collect()
        left.append(sum(isinstance(value, Frame) for value in gc.get_objects()))
    return [count - left[0] for count in left]


def looks(model: Any, x: torch.Tensor) -> None:
    model(x).sum().item()


def learns(model: Any, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad()


def learns_of_its_input(model: Any, x: torch.Tensor) -> None:
    torch.autograd.grad(model(x.requires_grad_()).sum(), x)


def keeps_the_graph(model: Any, x: torch.Tensor) -> None:
    model(x).square().mean().backward(retain_graph=True)
    model.zero_grad()


def differentiates_twice(model: Any, x: torch.Tensor) -> None:
    torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)


def stops(model: Any, x: torch.Tensor) -> None:
    y = model(x)
    y.register_hook(lambda gradient: gradient.no_such_thing)
    with pytest.raises(AttributeError):
        y.sum().backward()


@pytest.mark.parametrize("step", [looks, learns, learns_of_its_input, keeps_the_graph, differentiates_twice, stops])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", ["overlap", "stress"])
def test_a_graph_that_no_backward_runs_through_is_freed(schedule: str, recompute: bool, step: Any) -> None:
    found = run_ranks(2, frames_left, step, recompute, init={"schedule": schedule}, fresh=True)
    assert found == [[0, 0, 0]] * 2


def frames_left_of_penalties() -> list[int]:
    model: Any = bmt.BMTrainModelWrapper(nn.Sequential(Unused(), Unused()))
    left = []
    for _ in range(3):
        for _ in range(4):
            with bmt.gathered(model):
                sum(torch.tanh(parameter).sum() for parameter in model.parameters())
            looks(model, oracle.inputs(0))
        gc.collect()
        left.append(sum(isinstance(value, torch.Tensor) for value in gc.get_objects()))
    return left


@on_ranks(1, 2, fresh=True)
def test_a_penalty_that_no_backward_runs_through_is_freed() -> None:
    left = frames_left_of_penalties()
    assert left[1] == left[2]
