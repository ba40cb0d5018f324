"""Blocks whose inputs are views of parameters, which their gather buffer does not hold until the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x) + shift)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Part(), Part()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.second(self.first(x, shift), shift)


class Latents(nn.Module):
    """Learned queries are the first layer's input; part of a learned table is an input of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, 8))
        self.table = nn.Parameter(torch.randn(9, 8))
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.head = nn.Linear(8, 3)

    def forward(self, batch: int) -> Tensor:
        x = self.latents.expand(batch, 5, 8)
        for layer in self.layers:
            x = layer(x, self.table[2:7])
        return self.head(x)


@pytest.mark.parametrize("nested", [False, True])
@on_ranks(1, 2)
def test_views_of_parameters_as_inputs(nested: bool) -> None:
    torch.manual_seed(1)
    plain = Latents()
    copied = copy.deepcopy(plain)
    for layer in copied.layers:
        if nested:
            layer.second = bmt.Block(layer.second)
        bmt.Block(layer)
    model = bmt.BMTrainModelWrapper(copied)
    manager = bmt.optim.OptimManager()
    for _ in range(2):  # the second run is prefetched along the first
        plain.zero_grad()
        for parameter in model.parameters():
            parameter.grad = None
        plain(3).square().mean().backward()
        manager.backward(model(3).square().mean())
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            gradient = bmt.gather_grad(q)
            assert p.grad is not None and gradient is not None
            assert torch.allclose(p.grad, gradient, atol=1e-7), name
