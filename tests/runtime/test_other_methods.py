"""Loops that run other methods of blocks than their forward: decoding by steps, codes, streaming."""

from __future__ import annotations

from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH
from ranks import run_ranks
from torch import nn

DEPTH = 6
WORLDS = [1, 2]


def build(names: models.Names) -> Any:
    class Layer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.linear(self.norm(x)))

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0.5 + torch.tanh(self.linear(self.norm(x)))

    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = names.stack([Layer() for _ in range(DEPTH)])
            self.whole: list[int] = []

        def infer(self, x: torch.Tensor) -> torch.Tensor:
            self.whole = []
            for layer in self.layers:
                x = layer.step(x)
                units = [m.__dict__.get("_bmt_unit") for m in self.layers.children()]
                self.whole.append(sum(unit is not None and unit.moves and unit.is_whole for unit in units))
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.infer(x)

    return Model()


def methods_match() -> None:
    oracle.matches(build)
    reference, model = oracle.pair(build)
    with torch.no_grad():
        assert torch.equal(model.infer(oracle.inputs(0)), reference.infer(oracle.inputs(0)))


@pytest.mark.parametrize("world_size", WORLDS)
def test_methods_compute_the_same(world_size: int) -> None:
    run_ranks(world_size, methods_match)


def methods_release() -> None:
    model = build(models.sharded())
    with torch.no_grad():
        model.infer(oracle.inputs(0))
    assert 1 <= max(model.whole) <= 2


def test_methods_called_from_outside_release() -> None:
    run_ranks(2, methods_release)
