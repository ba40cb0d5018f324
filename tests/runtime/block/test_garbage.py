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
from ranks import on_ranks
from torch import nn

import bmtrain as bmt


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


def tied(module: Any) -> Any:
    """A cycle, so that reference counts do not tell when it is gone."""
    module.__dict__["itself"] = [module]
    return module


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
