"""However blocks are used, each use costs one gather, started before it is needed: gathers are counted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.whole_units import WholeUnits
from bmtrain.shard.unit import ShardUnit, State

LAYERS = 6
ORDERS = {
    "all": [0, 1, 2, 3, 4, 5],
    "skipped": [0, 2, 3, 5],
    "left early": [0, 1, 2],
    "started late": [3, 4, 5],
    "backwards": [5, 4, 3, 2, 1, 0],
    "twice in a row": [0, 1, 1, 2, 3, 4, 5],
    "twice apart": [0, 1, 2, 3, 4, 5, 0],
    "all twice": [0, 1, 2, 3, 4, 5] * 2,
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(oracle.WIDTH, oracle.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(oracle.WIDTH, oracle.WIDTH), nn.Linear(oracle.WIDTH, 3)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        x = self.stem(x)
        for index in order:
            x = self.layers[index](x)
        return self.head(x)


class Counter:
    """Gathers while it is entered, and those among them that somebody had to wait for from their start."""

    def __init__(self) -> None:
        self.gathers: list[str] = []
        self.late: list[str] = []

    def __enter__(self) -> Counter:
        gather, start = WholeUnits.gather, ShardUnit.prefetch

        def counted_gather(residency: WholeUnits, unit: ShardUnit, *args: Any) -> None:
            if unit.state is State.SHARDED:
                self.late.append(unit.name)
            gather(residency, unit, *args)

        def counted_start(unit: ShardUnit, *args: Any) -> None:
            if unit.state is State.SHARDED:
                self.gathers.append(unit.name)
            start(unit, *args)

        self._patches = [
            mock.patch.object(WholeUnits, "gather", counted_gather),
            mock.patch.object(ShardUnit, "prefetch", counted_start),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self._patches:
            patch.stop()


def steady_step(order: list[int], recompute: bool) -> tuple[list[str], list[str]]:
    """Gathers of the fourth step that uses blocks in this order."""
    model = Net()
    for layer in model.layers:
        bmt.Block(layer, use_checkpoint=recompute)
    bmt.BMTrainModelWrapper(model)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters()))
    x = oracle.inputs(0).to(next(model.parameters()).device)
    for _ in range(4):
        with Counter() as counter:
            manager.zero_grad()
            manager.backward(oracle.mean(model(x, order)))
            manager.step()
    return counter.gathers, counter.late


def check(name: str, recompute: bool, device: str) -> None:
    order = ORDERS[name]
    uses = 1 + sum(one != other for one, other in pairwise(order))
    for gathers, late in run_ranks(2, steady_step, order, recompute, init={"device": device}):
        # One for the root, and one for each use in either direction; the backward begins with what is whole still.
        assert len(gathers) <= 2 * uses - 1, gathers
        # On a CPU nothing is gathered while the optimizer steps, so the root's comes when the model is called.
        assert late == ([""] if device == "cpu" else []), late


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", ORDERS)
def test_every_use_is_foreseen(name: str, recompute: bool) -> None:
    check(name, recompute, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [True, False])
def test_every_use_is_foreseen_on_gpus(recompute: bool) -> None:
    for name in ORDERS:
        check(name, recompute, "cuda")


@on_ranks(2)
def test_an_order_that_changes_once() -> None:
    """A step that leaves the usual order pays for that step alone."""
    model = Net()
    for layer in model.layers:
        bmt.Block(layer)
    bmt.BMTrainModelWrapper(model)
    usual, other = ORDERS["all"], ORDERS["skipped"]
    late = []
    for order in (usual, usual, usual, other, usual, usual):
        with Counter() as counter:
            model(oracle.inputs(0), order).sum().backward()
        late.append(len(counter.late))
    assert late[2] == late[5] == 1, late
    assert late[3] <= 5 and late[4] <= 5, late
