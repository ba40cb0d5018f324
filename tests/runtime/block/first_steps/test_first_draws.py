"""Random numbers that are the same on all ranks where samples differ are pointed out, once, and nothing else is."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.first_steps.draws import FirstDraws
from bmtrain.context import context
from bmtrain.device import Device

CPU = {"device": "cpu"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.up(x))


class Model(nn.Module):
    """``draw`` is what its own forward does beside calling layers."""

    def __init__(self, draw: Callable[[torch.Tensor], Any] = lambda x: 0.0) -> None:
        super().__init__()
        self.draw, self.enter = draw, nn.Linear(4, 4)
        self.blocks = bmt.TransformerBlockList([bmt.Block(Block(), use_checkpoint=n == 0) for n in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x) + self.draw(x)
        return self.blocks(x)


def own(x: torch.Tensor) -> Any:
    with bmt.own_random():
        return torch.randn_like(x)


heard = partial(oracle.heard, "own_random")


def train(model: nn.Module, before: Callable[[torch.Tensor], Any] = lambda x: 0.0, steps: int = 6) -> list[str]:
    made: Any = bmt.BMTrainModelWrapper(model)
    optimizer = bmt.optim.AdamOptimizer(made.parameters(), lr=1e-3)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    with heard() as found:
        for step in range(steps):
            x = torch.full((4, 4), float(bmt.rank() + step))
            x = x + before(x)
            manager.zero_grad()
            manager.backward(made(x).square().mean())
            manager.step()
    return found


def reseeds(x: torch.Tensor) -> Any:
    torch.manual_seed(int(x[0, 0]))
    return 0.0


def nothing_to_say() -> None:
    assert train(Model()) == train(Model(own)) == train(Model(), own) == train(Model(), reseeds) == []
    assert train(Model(), numpys) == train(Model(), pythons) == train(Model(own_of_numpy)) == []
    once = iter([torch.ones(())])
    assert train(Model(), lambda x: torch.rand(()) if next(once, None) is not None else 0.0) == []


DRAWS: list[Callable[[torch.Tensor], Any]] = [
    torch.randn_like, lambda x: torch.rand(4, 1) < 0.5, lambda x: nn.functional.dropout(x, 0.5),
]  # fmt: skip


def numpys(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.random.randn(*x.shape)).float().to(x.device)


def pythons(x: torch.Tensor) -> float:
    return random.gauss(0.0, 1.0)


def own_of_numpy(x: torch.Tensor) -> torch.Tensor:
    with bmt.own_random():
        return numpys(x) * pythons(x)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + numpys(x)


@on_ranks(2, fresh=True, init=CPU)
def test_of_numpy_and_random() -> None:
    in_a_block = Model()
    in_a_block.blocks = bmt.TransformerBlockList([bmt.Block(Noisy())])
    for model in (Model(numpys), Model(pythons), in_a_block):
        engine: Any = context().engine
        engine.first_draws = FirstDraws(context(), engine.first_steps)
        found = train(model)
        assert len(found) == (bmt.rank() == 0) and all("by numpy or Python's random" in one for one in found)


@pytest.mark.parametrize("number", range(3))
@on_ranks(2, fresh=True, init=CPU)
def test_in_a_models_own_forward(number: int) -> None:
    found = train(Model(DRAWS[number]))
    assert len(found) == (bmt.rank() == 0)
    assert all("by a model's own forward" in one and "test_first_draws.py:" in one for one in found)


def before_it() -> None:
    found = train(Model(), torch.randn_like)
    assert len(found) == (bmt.rank() == 0) and all("before the model is called" in one for one in found)
    assert len(train(Model(), torch.randn_like)) == len(found)  # of each model


@contextmanager
def apart() -> Iterator[None]:
    """As on a GPU, whose generator gives nothing but what layers and samples draw."""
    with mock.patch.object(Device, "decides_apart", True):
        yield


def as_on_a_gpu(what: Callable[[], None]) -> None:
    with apart():
        what()


def shared() -> None:
    assert train(Model(torch.randn_like)) == []


def as_it_is(what: Callable[[], None]) -> None:
    what()


def in_every_way(what: Callable[[], None]) -> None:
    """On CPUs as on GPUs, and on GPUs where there are some."""
    run_ranks(2, as_on_a_gpu, what, fresh=True, init=CPU)
    if os.environ.get("BMTRAIN_TEST_DEVICE") == "cuda":
        run_ranks(2, as_it_is, what, fresh=True, drawn_on_cpu=False)


def test_nothing_to_say() -> None:
    run_ranks(1, in_silence, fresh=True)
    run_ranks(2, nothing_to_say, fresh=True, init=CPU)
    in_every_way(nothing_to_say)
    run_ranks(2, shared, init={"random": "shared"}, fresh=True)


def in_silence() -> None:
    assert train(Model(torch.randn_like), torch.randn_like) == []


def test_before_the_forward() -> None:
    in_every_way(before_it)


@on_ranks(2, init=CPU)
def test_what_gives_the_order_of_the_data_is_not_noise() -> None:
    assert train(Model(), torch.randn_like) == []
