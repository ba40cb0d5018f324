"""A recomputed block draws the same numbers again, from whichever generator."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context


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
