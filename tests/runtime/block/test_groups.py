"""Lists of pairs of modules: each pair is whole while a loop has it, and no longer."""

from __future__ import annotations

from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH
from ranks import on_ranks, run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import bmtrain as bmt
from bmtrain.block.record import unit_of
from bmtrain.context import context

DEPTH = 5
WORLDS = [1, 2]


def build(names: models.Names, keep: str = "") -> Any:
    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            pairs = [nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)]) for _ in range(DEPTH)]
            self.layers = names.stack(pairs)
            self.whole: list[int] = []

        def forward(self, x: torch.Tensor) -> Any:
            kept = []
            self.whole = []
            for linear, norm in self.layers:
                x = x + torch.tanh(linear(norm(x)))
                # What a sharded parameter refuses outside a block, a pair in hand does not.
                x = x + norm.bias.to(x.dtype).mean() * linear.weight.norm()
                if keep == "views":
                    kept.append(linear.weight[0])
                self.whole.append(count_whole(self.layers))
            if keep == "break":
                for linear, _ in self.layers:
                    x = linear(x)
                    break
            for index, (linear, _) in enumerate(self.layers[1:]):
                x = linear(x) + index
            return x + sum(part.sum() for part in kept) if kept else x

    return Model()


def count_whole(layers: nn.ModuleList) -> int:
    units = [unit_of(m) for m in layers._modules.values() if m is not None]
    return sum(unit is not None and unit.moves and unit.is_whole for unit in units)


def pairs_match() -> None:
    for keep in ("", "views", "break"):
        oracle.matches(lambda names, keep=keep: build(names, keep))


@pytest.mark.parametrize("world_size", WORLDS)
def test_pairs_compute_the_same(world_size: int) -> None:
    run_ranks(world_size, pairs_match)


@on_ranks(2)
def test_pairs_are_released() -> None:
    model = build(models.sharded())
    model(oracle.inputs(0)).sum().backward()
    with torch.no_grad():
        model(oracle.inputs(0))
    assert max(model.whole) <= 2 and model.whole[-1] >= 1
    kept = build(models.sharded(), "views")
    kept(oracle.inputs(0))
    # Their parameters are still looked at; where buffers are used again they must stay.
    assert kept.whole[-1] == DEPTH if context().device.is_cuda else max(kept.whole) <= 2


def levels(names: models.Names, nested: bool = False, saves: bool = False) -> Any:
    """Namespaces of parts, taken by index, as in U-nets of autoencoders; perhaps inside a block, or checkpointed."""

    class Net(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            made = []
            for _ in range(DEPTH):
                level = nn.Module()
                level.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
                level.norm = nn.LayerNorm(WIDTH)
                made.append(level)
            self.layers = names.stack(made)
            self.whole: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.whole, seen = [], [x]
            for i in range(DEPTH):
                for j in range(2):
                    if saves:
                        x = x + checkpoint(self.layers[i].parts[j], x, use_reentrant=bool(i % 2))
                    x = x + torch.tanh(self.layers[i].parts[j](self.layers[i].norm(x)))
                x = x * self.layers[i].norm.weight.to(x.dtype)
                seen.append(x)
                self.whole.append(count_whole(self.layers))
            for i in reversed(range(DEPTH)):
                # Two at once: the first is not in hand any more when its parts are called.
                before, level = self.layers[i - 1], self.layers[i]
                x = level.parts[0](x) + before.parts[1](seen.pop())
            return x

    class Outer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = names.block(Net())

        def forward(self, x: torch.Tensor) -> Any:
            return self.net(self.net(x))

    return Outer() if nested else Net()


def levels_match() -> None:
    oracle.matches(levels)
    oracle.matches(lambda names: levels(names, nested=True))
    oracle.matches(lambda names: levels(names, saves=True))


@pytest.mark.parametrize("world_size", WORLDS)
def test_levels_compute_the_same(world_size: int) -> None:
    run_ranks(world_size, levels_match)


@on_ranks(2)
def test_levels_are_released() -> None:
    model = levels(models.sharded())
    model(oracle.inputs(0)).sum().backward()
    assert max(model.whole) <= 2 and model.whole[-1] >= 1
    with torch.no_grad():
        model(oracle.inputs(0))
    assert max(model.whole) <= 2
    assert count_whole(model.layers) == 0
    assert model.layers[0].norm.weight.shape == (WIDTH,) and count_whole(model.layers) == 0  # outside of a forward


@on_ranks(2)
def test_pairs_of_an_ordinary_model() -> None:
    model = bmt.BMTrainModelWrapper(build(models.plain()))
    assert isinstance(model.layers, bmt.TransformerBlockList) and len(model.layers[1:]) == DEPTH - 1
    model(oracle.inputs(0)).sum().backward()
    assert max(model.whole) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("match", [pairs_match, levels_match])
def test_groups_compute_the_same_on_gpus(match: Any) -> None:
    run_ranks(2, match, init={"device": "cuda"})
