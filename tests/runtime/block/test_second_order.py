"""Gradients of gradients: what the first backward saves must still be there when the second one needs it."""

from __future__ import annotations

from typing import Any

import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

from bmtrain.context import context

WIDTH = 8


def build(blocks: int, names: models.Names) -> Any:
    class Block(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]

    class Net(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
            self.stack = names.stack([Block() for _ in range(blocks)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            for block in self.stack:
                x = block(x)
            return self.head(x)  # type: ignore[no-any-return]

    return Net()


def maml(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weights = dict(model.named_parameters())
    inner = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
    grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    fast = {name: p - 0.5 * g for (name, p), g in zip(weights.items(), grads, strict=True)}
    return F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y)


def penalty(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return (grad.norm(dim=1) - 1).square().mean() + F.cross_entropy(model(x), y)


def penalty_of_loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in grads)


@on_ranks(1, 2, init={"schedule": "stress"})  # buffers are used again, and spoiled, as soon as they go back
@pytest.mark.parametrize("objective", [maml, penalty, penalty_of_loss])
@pytest.mark.parametrize("blocks", [2, pytest.param(7, marks=pytest.mark.long)])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_of_gradients(objective: Any, blocks: int, recompute: bool) -> None:
    """Every rank has the whole batch, so that means over ranks are those of one process, of any objective."""
    reference, model = oracle.pair(lambda names: build(blocks, names), recompute)
    device = context().device.torch_device
    reference.to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, WIDTH, generator=generator, device="cpu").to(device)
    y = torch.randint(3, (8,), generator=generator, device="cpu").to(device)
    for _ in range(2):
        expected = objective(reference, x, y)
        expected.backward()
        found = objective(model, x, y)
        found.backward()
        oracle.assert_close(found.detach(), expected.detach(), "the objective", 1e-4)
    oracle.assert_same_grads(model, reference, 1e-4)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, "hooks of a node outlive it"
