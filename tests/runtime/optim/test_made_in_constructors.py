"""Optimizers that a model's constructor makes: their parameters are sharded when it ends."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from ranks import RanksFailed, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.of_no_module import OfNoModule
from bmtrain.context import context

INPUTS = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.5, -0.5, 2.0, 1.0]])


def net(base: type[nn.Module], managed: bool) -> Any:
    class Inner(base):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x)
            return out

    class Outer(base):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Inner()
            self.temperature = [nn.Parameter(torch.ones(()))]  # of no module
            self.optimizer = torch.optim.SGD([*self.net.parameters(), *self.temperature], lr=0.1)
            if managed:
                self.manager = bmt.optim.OptimManager(loss_scale=None)
                self.manager.add_optimizer(self.optimizer)

        def forward(self, x: torch.Tensor, inside: bool) -> torch.Tensor:
            loss = (self.net(x) * self.temperature[0]).square().mean()
            if inside:
                self.optimizer.zero_grad()
                loss.backward()
                (self.manager if managed else self.optimizer).step()
            return loss

    torch.manual_seed(3)
    return Outer()


def train(how: str, sharded: bool = True) -> dict[str, list[float]]:
    model = net(bmt.DistributedModule if sharded else nn.Module, sharded)
    own = bmt.shard_batch(INPUTS) if sharded else INPUTS
    for _ in range(3):
        loss = model(own, how == "in the forward")
        if how != "in the forward":
            model.optimizer.zero_grad()
            if sharded and how == "managed":
                model.manager.backward(loss)
            else:
                loss.backward()
            (model.manager if sharded else model.optimizer).step()
    values = {**model.state_dict(), "temperature": model.temperature[0].detach()}
    return {name: value.flatten().tolist() for name, value in values.items()}


@pytest.mark.parametrize(
    ("world_size", "how"), [(1, "managed"), (2, "managed"), (1, "plain"), (2, "plain"), (1, "in the forward")]
)
def test_trains_as_one_process_does(world_size: int, how: str) -> None:
    expected = train(how, sharded=False)
    for found in run_ranks(world_size, train, how):
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values == pytest.approx(expected[name], abs=1e-6), name


def test_a_step_in_the_forward_says_so_on_several_ranks() -> None:
    with pytest.raises(RanksFailed, match="An optimizer stepped in the forward"):
        run_ranks(2, train, "in the forward")


def averaged_together() -> list[int]:
    """How many elements are averaged of a parameter that was sharded later, is gone on one rank, and got a gradient."""
    averaged: list[list[torch.Tensor]] = []
    driven = OfNoModule(context())
    model, other = nn.Linear(3, 3, bias=False), nn.Parameter(torch.ones(2, device=context().device.torch_device))
    driven.drive([model.weight, other], averaged.append)
    bmt.BMTrainModelWrapper(model)
    driven._reached |= {0, 1}
    if bmt.rank() == 0:
        driven._driven[0] = dataclasses.replace(driven._driven[0], parameter=weakref.ref(nn.Parameter()))
    driven.backward_ends()
    return [parameter.numel() for those in averaged for parameter in those]


def test_what_was_sharded_is_averaged_by_no_rank() -> None:
    assert run_ranks(2, averaged_together) == [[2], [2]]
