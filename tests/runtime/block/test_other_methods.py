"""Loops that run other methods of blocks than their forward: decoding by steps, codes, streaming."""

from __future__ import annotations

from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH
from ranks import on_ranks, run_ranks
from torch import nn

from bmtrain.block.record import unit_of
from bmtrain.context import context
from bmtrain.shard.unit import State

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
                units = [unit_of(m) for m in self.layers.children()]
                self.whole.append(
                    sum(unit is not None and unit.moves and unit.state is not State.SHARDED for unit in units)
                )
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.infer(x)

    return Model()


def infer_between(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Two graphs before one backward, without gradients and with, methods and forwards in turn."""
    first = model.infer(x)
    with torch.no_grad():
        model.infer(x)
        model(x)
    second = model(x) + model.infer(model.layers[0].step(x))
    model.infer(x)  # has no backward
    return oracle.mean(first) + oracle.mean(second)


def methods_match() -> None:
    oracle.matches(build)
    oracle.matches(build, run=lambda model, x: oracle.mean(model.infer(x)))  # no module's forward runs
    oracle.matches(build, run=infer_between)
    reference, model = oracle.pair(build)
    device = context().device.torch_device
    reference.to(device)
    with torch.no_grad():
        x = oracle.inputs(0).to(device)
        assert torch.equal(model.infer(x), reference.infer(x))


@pytest.mark.parametrize("world_size", WORLDS)
def test_methods_compute_the_same(world_size: int) -> None:
    run_ranks(world_size, methods_match)


@on_ranks(2)
def test_methods_called_from_outside_release() -> None:
    model = build(models.sharded())
    with torch.no_grad():
        model.infer(oracle.inputs(0))
    assert 1 <= max(model.whole) <= 2


def features(names: models.Names) -> Any:
    """A model whose method, called from outside, uses parameters of its own in all the ways that vision models do."""

    class Features(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
            self.first = names.Parameter(torch.randn(1, 1, WIDTH))
            self.places = names.Parameter(torch.randn(1, 8, WIDTH))
            self.scale = names.Parameter(torch.tensor(0.1))
            self.layers = names.stack([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)])

        def features(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).unsqueeze(1)
            first = self.first.expand(len(x), -1, -1)  # views of whole values, used when others are whole
            places = self.places[:, : x.shape[1] + 1].to(x.dtype)
            x = self.norm(torch.cat([first, x], dim=1) + places) * self.scale.exp()
            for layer in self.layers:
                x = layer(x) + first * places[:, :1]
            return self.head(self.norm(x)).mean(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.features(x)

    return Features()


def features_match() -> None:
    oracle.matches(features)
    oracle.matches(features, run=lambda model, x: oracle.mean(model.features(x)))
    oracle.matches(features, run=lambda model, x: oracle.mean(model.features(x) + model(model.features(x).tanh())))


@pytest.mark.parametrize("world_size", WORLDS)
def test_methods_that_use_parameters_of_their_own(world_size: int) -> None:
    run_ranks(world_size, features_match)


@pytest.mark.gpu
@pytest.mark.parametrize("match", [methods_match, features_match])
def test_methods_compute_the_same_on_gpus(match: Any) -> None:
    run_ranks(2, match, init={"device": "cuda"})
