"""Buffers of recomputed blocks change once a step, as without recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import bmtrain as bmt


class Layer(nn.Module):
    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.last + x.detach().mean(0)
        return x + torch.tanh(self.norm(self.inner(x)))


def train(recompute: bool) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(Layer(), Layer())
    model = bmt.BMTrainModelWrapper(
        nn.Sequential(*(bmt.Block(copy.deepcopy(m), use_checkpoint=recompute) for m in plain))
    )
    x = torch.randn(6, 4)
    manager = bmt.optim.OptimManager()
    for _ in range(2):
        plain(x).square().mean().backward()
        manager.backward(model(x).square().mean())
    for (name, expected), (_, found) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(expected, found), name
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        gradient = bmt.gather_grad(q)
        assert p.grad is not None and gradient is not None
        assert torch.allclose(p.grad, gradient, atol=1e-7), name


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_buffers_change_once(world_size: int, recompute: bool) -> None:
    run_ranks(world_size, train, recompute)
