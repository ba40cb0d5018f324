"""A script that captures its own step as a CUDA graph is told what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import UnsupportedError

TOLD = "Take the capture out.*BMTRAIN_GRAPHS=1"


def made() -> tuple[nn.Module, bmt.optim.OptimManager]:
    model = bmt.BMTrainModelWrapper(nn.Sequential(*[bmt.Block(nn.Linear(8, 8)) for _ in range(2)]))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    return model, manager


def step(model: nn.Module, manager: bmt.optim.OptimManager, x: torch.Tensor) -> float:
    loss = model(x).square().mean()
    manager.zero_grad()
    manager.backward(loss)
    manager.step()
    return loss.item()


class Captured:
    """A device that says it is captured, for a while."""

    def __init__(self, device: Any) -> None:
        self.kind, self.before = type(device), type(device).is_captured

    def __enter__(self) -> None:
        self.kind.is_captured = property(lambda self: True)

    def __exit__(self, *error: object) -> None:
        self.kind.is_captured = self.before


@on_ranks(1, 2)
def test_it_is_told_before_anything_is_done() -> None:
    model, manager = made()
    x = torch.ones(4, 8)
    first = step(model, manager, x)
    with Captured(context().device):
        for training in (True, False):
            with torch.set_grad_enabled(training), pytest.raises(UnsupportedError, match=TOLD):
                model(x)
    assert step(model, manager, x) < first  # and goes on


@pytest.mark.gpu
@on_ranks(1, 2, init={"device": "cuda"}, fresh=True)
def test_on_a_gpu() -> None:
    model, manager = made()
    x = torch.ones(4, 8, device="cuda")
    first = step(model, manager, x)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UnsupportedError, match=TOLD), torch.cuda.graph(graph):
        model(x)
    assert step(model, manager, x) < first


@pytest.mark.gpu
@on_ranks(1, init={"device": "cuda"}, fresh=True)
def test_graphed_callables_on_a_gpu() -> None:
    model, manager = made()
    x = torch.ones(4, 8, device="cuda")
    step(model, manager, x)
    with pytest.raises(UnsupportedError, match=TOLD):
        torch.cuda.make_graphed_callables(model, (x,))
