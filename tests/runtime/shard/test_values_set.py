"""``p.set_(values)``: what torch's parametrizations end with must stay, wherever the parameter's values are."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.nn.utils import parametrize

import bmtrain as bmt
from bmtrain.errors import ShardedAccessError


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.scale


class Net(bmt.DistributedModule):
    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        if scaled:
            parametrize.register_parametrization(self.a, "weight", Scaled())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def values() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4)


@on_ranks(1, 2)
def test_outside_of_forwards() -> None:
    net = Net()
    with torch.no_grad():
        net.a.weight.set_(values())
    torch.testing.assert_close(net.state_dict()["a.weight"].cpu(), values())
    torch.testing.assert_close(net(torch.ones(1, 4)), values().sum(1)[None] + net.a.bias.gather())


@on_ranks(1, 2)
def test_where_it_is_whole() -> None:
    net = Net()
    with bmt.gathered(net, write=True), torch.no_grad():
        net.a.weight.set_(values())
    torch.testing.assert_close(net.state_dict()["a.weight"].cpu(), values())


@on_ranks(1, 2)
def test_a_parametrization_that_is_removed() -> None:
    for later in (False, True):
        net = Net(scaled=not later)
        if later:
            parametrize.register_parametrization(net.a, "weight", Scaled())
        x = torch.ones(1, 4)
        before = net(x).detach().clone()
        parametrize.remove_parametrizations(net.a, "weight")
        torch.testing.assert_close(net(x).detach(), before)


@on_ranks(1, 2)
def test_steps_go_on_from_what_was_set() -> None:
    net = Net()
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    with torch.no_grad():
        net.a.weight.set_(values())
    manager.backward(net(torch.ones(1, 4)).sum())
    manager.step()
    torch.testing.assert_close(net.state_dict()["a.weight"].cpu(), values() - 1)


@on_ranks(1, 2)
def test_what_is_no_value_of_its_shape_is_refused() -> None:
    net = Net()
    for given in ((torch.ones(2, 2),), (torch.ones(12), 0, (3, 4), (4, 1)), ()):
        with pytest.raises(ShardedAccessError), torch.no_grad():
            net.a.weight.set_(*given)
