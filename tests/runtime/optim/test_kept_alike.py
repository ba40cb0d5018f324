"""What ranks keep alike is compared every so many steps, and what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ConfigurationError, RankDivergenceError


class Net(bmt.DistributedModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = bmt.TransformerBlockList([bmt.Block(nn.Linear(6, 6)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x).tanh()
        return self.norm(x) * self.scale.mean()  # type: ignore[no-any-return]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamOptimizer": lambda params: bmt.optim.AdamOptimizer(params, lr=1e-2),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
}


class Training:
    def __init__(self, optimizer: str = "AdamOptimizer", **options: Any) -> None:
        self.model = Net()
        self.temperature = nn.Parameter(torch.ones(2))
        self.optimizer = OPTIMIZERS[optimizer]([*self.model.parameters(), self.temperature])
        self.manager = bmt.optim.OptimManager(**{"compare_every": 2, **options})
        self.manager.add_optimizer(self.optimizer)

    def step(self, step: int) -> None:
        self.manager.zero_grad()
        out = self.model(models.share(oracle.inputs(step))) * self.temperature.sum()
        self.manager.backward(oracle.mean(out))
        self.manager.step()


@on_ranks(1)
def test_no_number_of_steps() -> None:
    for number in (0, -1):
        with pytest.raises(ConfigurationError, match="compare_every"):
            bmt.optim.OptimManager(compare_every=number)


def trains(optimizer: str, **options: Any) -> None:
    training = Training(optimizer, **options)
    for step in range(4):
        training.step(step)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@on_ranks(1, 2, init={"schedule": "stress"})
def test_ranks_that_agree_train(optimizer: str) -> None:
    for options in ({}, {"loss_scale": 64.0}, {"nonfinite": "skip"}):
        trains(optimizer, **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@on_ranks(4, init={"shard_size": 2})
def test_replicas_that_agree_train(optimizer: str) -> None:
    trains(optimizer)


def spoil_shard(training: Training) -> None:
    training.model.parts[1].weight._flat.shard[0] += 1e-4


def spoil_moment(training: Training) -> None:
    flat = training.model.parts[0].bias._flat
    training.optimizer._states[flat.key].exp_avg[0] += 1


def spoil_buffer(training: Training) -> None:
    training.model.scale[1] = 2


def spoil_other(training: Training) -> None:
    training.temperature.data[0] += 1


def differs(spoil: Callable[[Training], None], named: str, rank: int) -> None:
    training = Training(compare_every=3)
    for step in range(2):
        training.step(step)
    if bmt.rank() == rank:
        spoil(training)
    with pytest.raises(RankDivergenceError) as found:
        training.step(2)
    text = str(found.value)
    assert "After step 3 ranks differ" in text and named in text, text
    assert f"on rank {rank}" in text, text


@pytest.mark.parametrize(("spoil", "named"), [(spoil_buffer, "Net.scale"), (spoil_other, "parameter ")])
@on_ranks(2)
def test_what_all_ranks_keep_is_named(spoil: Callable[[Training], None], named: str) -> None:
    differs(spoil, named, rank=1)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(spoil_shard, "Net.parts.1.weight"), (spoil_moment, "exp_avg"), (spoil_buffer, "Net.scale")],
)
@on_ranks(4, init={"shard_size": 2})
def test_what_replicas_keep_is_named(spoil: Callable[[Training], None], named: str) -> None:
    differs(spoil, named, rank=2)


@on_ranks(2, init={"shard_size": 1})
def test_a_step_that_is_not_due_compares_nothing() -> None:
    training = Training(compare_every=5)
    if bmt.rank():
        spoil_buffer(training)
    for step in range(4):
        training.step(step)


@on_ranks(2)
def test_ranks_with_other_buffers() -> None:
    training = Training(compare_every=1)
    if bmt.rank():
        training.model.register_buffer("own", torch.ones(1))
    with pytest.raises(RankDivergenceError, match="other parameters, optimizer states or buffers"):
        training.step(0)
