"""A module that holds nothing to gather, such as a loss, is computed wherever it is called, by one rank alone, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from tests.runtime.ranks import RanksFailed, run_ranks


class Loss(bmt.DistributedModule):
    def forward(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (out - wanted).square().mean()


class Several(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Loss(), nn.L1Loss()])

    def forward(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return self.parts[0](out, wanted) + self.parts[1](out, wanted)  # type: ignore[no-any-return]


class Noise(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x)  # type: ignore[no-any-return]


class Center(bmt.DistributedModule):
    """A buffer that follows a rank's own batch."""

    center: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(()))

    def forward(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        self.center.mul_(0.9).add_(out.detach().mean(), alpha=0.1)
        return (out - self.center - wanted).square().mean()


class Weighted(bmt.DistributedModule):
    """A buffer that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(4))

    def forward(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return ((out - wanted) * self.weight).square().mean()


class Net(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.block = nn.Linear(4, 4), bmt.Block(nn.Linear(4, 4))
        self.loss = Loss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.enter(x))  # type: ignore[no-any-return]


def on_this_device(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device=context().device.torch_device)


def of_a_model(model: Any) -> Any:
    """A loss that is part of it."""
    return model.loss


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [Loss, Several, Weighted, of_a_model])
@on_ranks(2, 3, init={"schedule": "stress"})  # gathers follow updates: there is something to let go of between steps
def test_one_rank_computes_a_loss_alone(make: Callable[..., Any], wrapped: bool) -> None:
    model = bmt.BMTrainModelWrapper(Net())
    loss = make(model) if make is of_a_model else bmt.BMTrainModelWrapper(make()) if wrapped else make()
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
    x = (1 + bmt.rank()) * on_this_device(3, 4)
    for _ in range(5):
        if bmt.rank() == 0:
            assert float(loss(x, x)) == 0.0
        manager.zero_grad()
        manager.backward(loss(model(x), x))
        manager.step()
        if bmt.rank() == 1:
            with torch.no_grad():
                assert float(loss(x, 0 * x)) > 0.0
    assert [*loss.state_dict()] == [name for name, _ in loss.named_buffers()]


@on_ranks(2)
def test_it_draws_a_ranks_own_numbers() -> None:
    noise = Noise().train()
    drawn = [noise(on_this_device(64)) for _ in range(3)]
    rows = bmt.gather_result(torch.stack(drawn)[None])
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("alone", [False, True])
@on_ranks(2)
def test_its_buffers_are_looked_at_once(alone: bool) -> None:
    """Where one rank has called another loss, too, nobody can say."""
    loss, other, model = Center(), Center(), bmt.BMTrainModelWrapper(Net())
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
    x = (1 + bmt.rank()) * on_this_device(3, 4)
    with oracle.heard("different buffers") as found:
        for _ in range(6):
            manager.zero_grad()
            manager.backward(loss(model(x), x))
            manager.step()
            if alone and bmt.rank() == 1:
                other(x, x)
    assert len(found) == (bmt.rank() == 0 and not alone)
    assert all("Center.center" in words for words in found)


class Statistics(bmt.DistributedModule):
    """Running statistics, of which the ranks are to have the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


def trains_statistics(alone: bool) -> torch.Tensor:
    norm, model = Statistics(), bmt.BMTrainModelWrapper(Net())
    x = (1 + bmt.rank()) * on_this_device(3, 4)
    if not alone or bmt.rank() == 0:
        norm(x)
    model(x)
    return norm.state_dict()["norm.running_mean"]  # type: ignore[no-any-return]


def test_running_statistics_are_of_all_ranks() -> None:
    for found in run_ranks(2, trains_statistics, False):
        torch.testing.assert_close(found, torch.full((4,), 0.15))
    with pytest.raises(RanksFailed, match=r"rank 0 to the forward of (the root|Statistics)"):
        run_ranks(2, trains_statistics, True, timeout=60)
