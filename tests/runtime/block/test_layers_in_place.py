"""Layers that change their input, in a list that became blocks: they cannot run again, and need not."""

from __future__ import annotations

import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt


class Features(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside in (3, 4, 4):
            layers += [nn.Conv2d(inside, 4, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2), nn.Hardtanh(inplace=True), nn.Dropout(0.0, inplace=True)]
        self.layers = kind(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1).mean(1)


def trained(kind: type) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = Features(kind)
    if kind is not nn.ModuleList:
        model = bmt.BMTrainModelWrapper(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    manager = bmt.optim.OptimManager(loss_scale=None)
    if kind is not nn.ModuleList:
        manager.add_optimizer(optimizer)
    for step in range(3):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().sum()
        if kind is nn.ModuleList:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            manager.zero_grad()
            manager.backward(loss)
            manager.step()
    return [value.clone() for value in model.state_dict().values()]


def test_the_same_as_torch() -> None:
    expected = run_ranks(1, trained, nn.ModuleList)[0]
    for ranks in (1, 2):
        for got in run_ranks(ranks, trained, bmt.TransformerBlockList):
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other)
