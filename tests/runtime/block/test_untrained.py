"""The first step says which parameters autograd came to without a gradient arriving, and is quiet on legal models."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block import linear


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.extra = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        x = self.down(self.up(x).tanh())
        if kind == "detached":
            return x + self.extra(x).detach()
        if kind == "dropped" or (kind == "one rank" and bmt.rank() == 0):
            return x + self.extra(x)
        if kind == "two outputs":
            return torch.stack([x, self.extra(x)])[0]
        if kind == "penalty":
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.extra(x).square().sum(), x, create_graph=True)
            return slope
        if kind == "none":
            return x + _NoGradient.apply(x, self.extra.weight)  # type: ignore[no-any-return, no-untyped-call]
        return x


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def said(kind: str, ours: bool, loses: bool = False, compiled: bool = False) -> list[str]:
    """What is said in three steps; with ``loses``, weight gradients that land get lost."""
    torch._dynamo.reset()
    with mock.patch.object(linear, "_LARGE", 0 if loses else 2**20):
        model = bmt.BMTrainModelWrapper(nn.ModuleList([bmt.Block(Layer(), use_checkpoint=False)]))
    if kind == "frozen":
        model[0].extra.requires_grad_(False)
    if compiled:
        bmt.compile(model, backend="aot_eager")
    device = next(model.parameters()).device
    maker: Any = bmt.optim.AdamOptimizer if ours else torch.optim.SGD
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(maker(model.parameters(), lr=0.01))
    lost = mock.patch.object(linear, "is_accumulated", lambda node: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            manager.zero_grad()
            loss = model[0](torch.ones(2, 6, device=device).requires_grad_(), kind).square().mean()
            if loses:
                with lost:
                    manager.backward(loss)
            else:
                manager.backward(loss)
            if kind == "dropped":
                for parameter in model[0].extra.parameters():
                    parameter.grad = None
            manager.step()
    return [str(w.message) for w in caught if "took part in the loss" in str(w.message)]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", ["unused", "frozen", "detached", "one rank", "two outputs", "penalty", "dropped"])
def test_legal_models_hear_nothing(kind: str, ours: bool) -> None:
    assert run_ranks(2, said, kind, ours) == [[], []]


@pytest.mark.parametrize(("ours", "compiled", "world_size"), [(True, False, 1), (True, True, 2), (False, False, 2)])
def test_a_lost_gradient_is_named_once(ours: bool, compiled: bool, world_size: int) -> None:
    for messages in run_ranks(world_size, said, "unused", ours, True, compiled, timeout=240):
        assert len(messages) == 1
        assert messages[0].startswith("up.weight, down.weight took part"), messages


def test_a_function_that_gives_no_gradient_is_named() -> None:
    for messages in run_ranks(2, said, "none", True):
        assert len(messages) == 1
        assert messages[0].startswith("extra.weight took"), messages
