"""Programs made up at random do the same on all ranks, whenever each collects garbage and whatever each records.

Each runs twice: with ranks alike, and with garbage collected on each in its own time and blocks recorded on some. Both
times give the same numbers; a rank that takes part in something else ends the job.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import PLENTY, fresh_graphs, memory_of
from models import tied
from ranks import run_ranks
from replayed import replays
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.objects import allgather_objects

WIDTH = 8
SETTINGS: list[dict[str, Any]] = [{}, {"shard_size": 1}, {"gradients": "sum"}, {"random": "shared"}]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        made = torch.tanh(self.lin(self.norm(x)))
        return x + (made if gate is None else made * gate)


class Net(nn.Module):
    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        layers = [Layer() for _ in range(chance.randint(1, 4))]
        if chance.random() < 0.3:
            layers[-1].lin.weight = layers[0].lin.weight
        self.gate = nn.Parameter(torch.ones(1, WIDTH)) if chance.random() < 0.3 else None
        recompute = chance.choice([None, False, True])
        blocks = [bmt.Block(layer, use_checkpoint=recompute) for layer in layers]
        self.is_list = self.gate is None and chance.random() < 0.5
        self.layers = bmt.TransformerBlockList(blocks) if self.is_list else nn.ModuleList(blocks)
        self.first, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x) if self.gate is None else layer(x, self.gate.expand_as(x))
        return self.head(x)  # type: ignore[no-any-return]


class Taught(nn.Module):
    """A student, and a teacher that may come anew."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        state = chance.getstate()
        self.net = Net(chance)
        chance.setstate(state)
        self.teacher = Net(chance)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            aim = self.teacher(x)
        return self.net(x) - 0.1 * aim  # type: ignore[no-any-return]


def managed(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> bmt.optim.OptimManager:
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(kind(model.parameters(), lr=1e-2))  # type: ignore[call-arg]
    return manager


class Program:
    """What all ranks do, by ``chance``, with ``collect`` in between."""

    def __init__(self, seed: int, folder: str, collect: Callable[[], None]) -> None:
        self.chance, self.folder, self.collect = random.Random(seed), folder, collect
        self.sizes, self.is_uneven = random.Random(10 * seed + bmt.rank()), self.chance.random() < 0.4
        self.numbers = torch.Generator(device="cpu").manual_seed(10 * seed + bmt.rank())
        self.casts = self.chance.random() < 0.5
        torch.manual_seed(seed)
        kind = self.chance.choice([Net, Taught])
        self.model: Any = tied(bmt.BMTrainModelWrapper(kind(self.chance)))
        self.manager = managed(self.model, self.chance.choice([torch.optim.SGD, torch.optim.AdamW]))
        self.others: list[Any] = []
        self.found: list[float] = []

    def loss(self, model: Any, rows: int = 4, casts: bool | None = None) -> Any:
        device = context().device.torch_device
        if self.is_uneven:
            rows *= self.sizes.choice([1, 1, 2, 30])
        x = torch.randn(rows, 4, generator=self.numbers, device="cpu").to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.casts if casts is None else casts):
            self.collect()
            return model(x).float().square().mean()

    def step(self, model: Any, manager: bmt.optim.OptimManager, rows: int = 4, micro: int = 1) -> None:
        for _ in range(micro):
            loss = self.loss(model, rows)
            self.collect()
            manager.backward(loss)
            self.found.append(float(loss.detach()))
        self.collect()
        if self.chance.random() < 0.5:
            manager.clip_grad_norm(model.parameters(), 1.0)
        manager.step()
        manager.zero_grad()

    def run(self, steps: int) -> None:
        done = [self.evaluates, self.copies, self.forgets, self.saves, self.averages, self.renews, self.writes]
        done += [self.reads, self.trains_another, self.trains_a_copy, self.trains_larger, self.checkpoints]
        for number in range(steps):
            for _ in range(self.chance.randint(0, 2)):
                self.chance.choice(done)(number)
                self.collect()
            self.step(self.model, self.manager, micro=self.chance.randint(1, 2))

    def evaluates(self, _: int) -> None:
        casts = self.chance.choice([None, not self.casts])
        with torch.no_grad():
            self.found.append(float(bmt.sum_loss(self.loss(self.model, casts=casts))))

    def copies(self, _: int) -> None:
        self.others.append(tied(copy.deepcopy(self.model)))

    def forgets(self, _: int) -> None:
        if self.others:
            self.others.pop()

    def saves(self, _: int) -> None:
        state = self.model.state_dict()
        self.found.append(float(sum(value.sum() for value in state.values())))
        bmt.save(self.model, f"{self.folder}/model.pt")
        bmt.load(self.model, f"{self.folder}/model.pt")

    def averages(self, _: int) -> None:
        for other in self.others[-1:]:
            with torch.no_grad():
                for kept, parameter in zip(other.parameters(), self.model.parameters(), strict=True):
                    kept.mul_(0.9).add_(parameter, alpha=0.1)
                self.found.append(float(bmt.sum_loss(self.loss(other))))

    def renews(self, _: int) -> None:
        if not isinstance(self.model, Taught):
            return
        self.others.clear()  # of other parameters
        if self.model.teacher.is_list or self.chance.random() < 0.5:
            self.model.teacher = tied(copy.deepcopy(self.model.net))
        else:
            layers = self.model.teacher.layers
            layers[0] = tied(copy.deepcopy(layers[len(layers) - 1]))

    def writes(self, _: int) -> None:
        if self.chance.random() < 0.5:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.data.mul_(0.99)
        else:
            with bmt.gathered(self.model, write=True):
                for parameter in self.model.parameters():
                    parameter.data.add_(0.001)

    def reads(self, _: int) -> None:
        self.found.append(float(sum(parameter.detach().square().sum() for parameter in self.model.parameters())))

    def trains_another(self, _: int) -> None:
        model = tied(bmt.BMTrainModelWrapper(Net(self.chance)))
        self.step(model, managed(model))

    def trains_a_copy(self, _: int) -> None:
        model = tied(copy.deepcopy(self.model))
        self.step(model, managed(model))

    def trains_larger(self, _: int) -> None:
        self.step(self.model, self.manager, rows=self.chance.choice([8, 200]))

    def checkpoints(self, number: int) -> None:
        folder = f"{self.folder}/{len(self.found)}"
        checkpointer = bmt.checkpoint.Checkpointer(folder, model=self.model, optimizer=self.manager, keep=1)
        checkpointer.save(number, wait=self.chance.random() < 0.5)
        checkpointer.latest()


def found(seed: int, folder: str, is_apart: bool) -> list[float]:
    """The numbers of a program."""
    own, chance = random.Random(-10 * seed - bmt.rank() - 1), random.Random(seed + 1)

    def collect() -> None:
        if is_apart and own.random() < 0.3:
            gc.collect()

    graphs = fresh_graphs(chance.choice([PLENTY, memory_of(3)]), chance.random() < 0.7)
    if is_apart and graphs is not None and own.random() < 0.5:
        graphs.is_on = False
    gc.collect()
    if is_apart:
        gc.disable()
    try:
        program = Program(seed, folder, collect)
        with replays():
            program.run(chance.randint(8, 14))
        steps = allgather_objects(context().engine.schedule.trace._count)  # type: ignore[attr-defined]
        assert len(set(steps)) == 1, steps
        return program.found
    finally:
        gc.enable()
        fresh_graphs(None, False)


def check(seed: int, folder: Path) -> None:
    init = {"schedule": "stress", "graphs": True, "memory": "auto"} | random.Random(seed).choice(SETTINGS)
    results = []
    for is_apart in (False, True):
        (folder / str(is_apart)).mkdir()
        results.append(run_ranks(2 + seed % 2, found, seed, str(folder / str(is_apart)), is_apart, init=init))
    assert results[0] == results[1]


@pytest.mark.parametrize("seed", range(6))
def test_programs(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6, 120))
def test_many_programs(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)
