"""A recomputed block draws the same numbers again, from whichever generator."""

from __future__ import annotations

import random
from typing import Any

import numpy
import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.linear(x), 0.5)
        return x * x * (1 + random.random())


def gradients(recompute: bool) -> list[torch.Tensor]:
    random.seed(3)
    torch.manual_seed(3)
    model = nn.Sequential(*[bmt.Block(Noisy(), use_checkpoint=recompute) for _ in range(3)])
    random.seed(4)
    torch.manual_seed(4)
    model(torch.randn(5, 4, device=context().device.torch_device)).sum().backward()
    return [g for p in model.parameters() if (g := bmt.gather_grad(p)) is not None]


@pytest.mark.parametrize("world_size", [1, 2])
def test_recomputation_repeats_random_numbers(world_size: int) -> None:
    kept = run_ranks(world_size, gradients, False)
    again = run_ranks(world_size, gradients, True)
    for one, other in zip(kept, again, strict=True):
        assert len(one) == 6
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


PLACES: list[str] = []


class Placed(nn.Module):
    """Notes where its forward makes tensors that name no device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        PLACES.append(torch.empty(1).device.type)
        return torch.tanh(self.linear(x)).square()


def places() -> list[str]:
    PLACES.clear()
    model = bmt.Block(Placed(), use_checkpoint=True)
    x = torch.ones(2, 4, device=context().device.torch_device)
    with torch.device("meta"):  # as set_default_device is to the thread in which autograd works on a GPU
        out = model(x)
    out.sum().backward()
    return PLACES


@pytest.mark.parametrize("world_size", [1, 2])
def test_recomputation_makes_tensors_on_the_same_default_device(world_size: int) -> None:
    assert run_ranks(world_size, places) == [["meta", "meta"]] * world_size


class Drawing(nn.Module):
    """Multiplies by what ``draw`` gives, from a generator that is an attribute, or lies outside."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.up, self.draw = nn.Linear(6, 6), draw
        self.torch, self.numpy = torch.Generator().manual_seed(1), numpy.random.default_rng(1)
        self.old, self.python = numpy.random.RandomState(1), random.Random(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x).tanh() * DRAWS[self.draw](self, (len(x), 6)).to(x.device, x.dtype)


OUTSIDE = torch.Generator(), numpy.random.RandomState()


class Late(Drawing):
    """Draws from its fifth run on."""

    def __init__(self, draw: str) -> None:
        super().__init__(draw)
        self.begins = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.begins else self.up(x).tanh()


def _start() -> None:
    numpy.random.seed(3)
    random.seed(3)
    OUTSIDE[0].manual_seed(3)
    OUTSIDE[1].seed(3)


DRAWS: dict[str, Any] = {
    "numpy": lambda module, shape: torch.from_numpy(numpy.random.randn(*shape)),
    "random": lambda module, shape: torch.tensor([random.gauss(0, 1) for _ in range(6)]),
    "own of torch": lambda module, shape: torch.randn(shape, generator=module.torch, device="cpu"),
    "own of numpy": lambda module, shape: torch.from_numpy(module.numpy.standard_normal(shape)),
    "own of numpy, old": lambda module, shape: torch.from_numpy(module.old.standard_normal(shape)),
    "own of random": lambda module, shape: torch.tensor([module.python.gauss(0, 1) for _ in range(6)]),
    "torch": lambda module, shape: torch.randn(shape, generator=OUTSIDE[0], device="cpu"),
    "numpy, old": lambda module, shape: torch.from_numpy(OUTSIDE[1].standard_normal(shape)),
}
"""Of the last two nobody can know."""


def _late(draw: str, block: Any, module: Any) -> list[torch.Tensor]:
    """Gradients of the steps in which ``block`` draws."""
    _start()
    found = []
    for step in range(9):
        block.begins = step >= 4
        numpy.random.randn(3)  # of numbers made in pairs, every second time one waits
        module.zero_grad()
        module(oracle.inputs(step)).square().mean().backward()
        if block.begins:
            found.append(torch.cat([bmt.gather_grad(p).flatten() for p in module.parameters()]))
    return found


@on_ranks(1, 2)
def test_a_block_that_begins_to_draw_late() -> None:
    for draw in list(DRAWS)[:6]:
        torch.manual_seed(2)
        plain = nn.Sequential(Late(draw), nn.Linear(6, 6))
        torch.manual_seed(2)
        other = nn.Sequential(Late(draw), nn.Linear(6, 6))
        other[0] = bmt.Block(other[0], use_checkpoint=True)
        model = bmt.BMTrainModelWrapper(other)
        expected = _late(draw, plain[0], plain)
        for found, right in zip(_late(draw, model[0], model), expected, strict=True):
            oracle.assert_close(found, right, draw)


@on_ranks(1, 2)
@pytest.mark.parametrize("draw", list(DRAWS))
def test_a_second_run_draws_what_the_first_drew(draw: str) -> None:
    device = context().device.torch_device
    plain, other = nn.Sequential(Drawing(draw), nn.Linear(6, 6)), nn.Sequential(Drawing(draw), nn.Linear(6, 6))
    other.load_state_dict(plain.state_dict())
    other[0] = bmt.Block(other[0], use_checkpoint=True)
    model: Any = bmt.BMTrainModelWrapper(other)
    _start()
    x = oracle.inputs(0).to(device)
    losses = [plain.to(device)(x + step).square().mean() for step in range(5)]
    sum(losses).backward()
    _start()
    losses = [model(x + step).square().mean() for step in range(5)]
    if draw in list(DRAWS)[-2:]:
        with pytest.raises(ConfigurationError, match="gave other values"):
            sum(losses).backward()
        return
    sum(losses).backward()
    oracle.assert_same_grads(model, plain)
