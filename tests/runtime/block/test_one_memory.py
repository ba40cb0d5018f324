"""Different Parameters on one memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

WIDTH = oracle.WIDTH


def build(change: Callable[[Any], None], names: models.Names) -> Any:
    """A model that ``change`` alters when its blocks are made."""

    class Net(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.blocks = names.stack([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
            change(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(self.a(x).tanh())
            for block in self.blocks:
                x = x + block(x)
            return x

    torch.manual_seed(4)
    return Net()


def halves(net: Any) -> None:
    flat = torch.randn(2 * WIDTH * WIDTH)
    net.a.weight = nn.Parameter(flat[: WIDTH * WIDTH].view(WIDTH, WIDTH))
    net.b.weight = nn.Parameter(flat[WIDTH * WIDTH :].view(WIDTH, WIDTH))


def columns(net: Any) -> None:
    wide = torch.randn(WIDTH, 2 * WIDTH)
    net.a.weight, net.b.weight = nn.Parameter(wide[:, :WIDTH]), nn.Parameter(wide[:, WIDTH:])


def a_part(net: Any) -> None:
    net.b.bias = nn.Parameter(net.a.weight.data[0])


def rows_that_meet(net: Any) -> None:
    flat = torch.randn(3 * WIDTH * WIDTH)
    net.a.weight = nn.Parameter(flat[: WIDTH * WIDTH].view(WIDTH, WIDTH))
    net.b.weight = nn.Parameter(flat[WIDTH : WIDTH + WIDTH * WIDTH].view(WIDTH, WIDTH))


def one_is_frozen(net: Any) -> None:
    net.b.weight = nn.Parameter(net.a.weight.data, requires_grad=False)


def layers(net: Any) -> None:
    net.b.weight = nn.Parameter(net.a.weight.data)


def blocks(net: Any) -> None:
    net.blocks[1].weight = nn.Parameter(net.blocks[0].weight.data)


def by_data(net: Any) -> None:
    net.b.weight.data = net.a.weight.data


def three(net: Any) -> None:
    net.b.weight = nn.Parameter(net.a.weight.data)
    net.blocks[1].weight = nn.Parameter(net.b.weight.data)


@on_ranks(1, 2)
def test_parts_of_one_memory_that_do_not_meet_are_parameters_of_their_own() -> None:
    for change in (halves, columns):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = build(change, models.sharded())
        assert len(list(model.parameters())) == 8
        oracle.assert_same_weights(model, build(change, models.plain()), exact=True)


@on_ranks(1, 2)
@pytest.mark.parametrize("change", [a_part, rows_that_meet, one_is_frozen])
def test_what_cannot_be_one_is_refused(change: Callable[[Any], None]) -> None:
    with pytest.raises(ConfigurationError, match="one Parameter of one module"):
        build(change, models.sharded())


@on_ranks(1, 2)
@pytest.mark.parametrize("change", [layers, blocks, by_data, three])
def test_they_stay_tied(change: Callable[[Any], None]) -> None:
    plain = build(change, models.plain())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = build(change, models.sharded())
    assert any("are one from now on" in str(one.message) for one in said) == (bmt.rank() == 0)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, foreach=False)  # at once, the ties would race on a GPU
    for step in range(3):
        theirs.zero_grad()
        oracle.mean(plain(oracle.inputs(step))).backward()  # type: ignore[no-untyped-call]
        theirs.step()
        manager.zero_grad()
        manager.backward(oracle.mean(model(oracle.inputs(step))))
        manager.step()
    oracle.assert_same_weights(model, plain, limit=1e-5)
