"""Models pickled whole, as ``torch.save(model, path)`` does, and models whose ``forward`` is called by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block import linear
from bmtrain.errors import CheckpointError


class Layer(bmt.DistributedModule):
    """A block with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.linear(x)


class Model(bmt.DistributedModule):
    """Blocks, a tied weight, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layers = bmt.TransformerBlockList([bmt.Block(Layer(), use_checkpoint=True) for _ in range(3)])
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens)))


TOKENS = torch.tensor([1, 2, 3, 4, 5, 6])


def cannot_be_pickled(folder: str) -> None:
    model = Model()
    model.extra = lambda: 1  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="Rank 0 could not write"):
        bmt.save_checkpoint(model, os.path.join(folder, "model.pt"))
    assert not os.listdir(folder)
    assert model(TOKENS).shape == (6, 7), "the model is as before"


def comes_back(folder: str) -> None:
    model, path = Model(), os.path.join(folder, "model.pt")
    other = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    before, keys = model(TOKENS), list(model.state_dict())
    bmt.save_checkpoint({"model": model, "others": [other], "step": 3}, path)
    assert torch.equal(model(TOKENS), before), "the model is as before"
    read: dict[str, Any] = torch.load(path, weights_only=False)
    again = read["model"]
    assert type(again).__name__ == "Model" and isinstance(again, Model) and list(again.state_dict()) == keys
    assert torch.equal(again(TOKENS), before) and read["step"] == 3
    assert again.head.weight is again.embedding.weight and not again.frozen.requires_grad
    assert all(isinstance(layer, bmt.Block) and layer._bmt.recompute for layer in again.layers)
    assert all(isinstance(p, bmt.DistributedParameter) for p in [*again.parameters(), *read["others"][0].parameters()])
    for trained in (model, again):
        manager = bmt.optim.OptimManager(loss_scale=None)
        manager.add_optimizer(bmt.optim.AdamOptimizer([p for p in trained.parameters() if p.requires_grad], lr=0.1))
        manager.backward(trained(TOKENS).square().mean())
        manager.step()
    assert torch.equal(model(TOKENS), again(TOKENS)) and not torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("check", [cannot_be_pickled, comes_back])
def test_models_pickled_whole(world_size: int, check: Any, tmp_path: Path) -> None:
    run_ranks(world_size, check, str(tmp_path))


def saved(path: str) -> list[list[float]]:
    model = Model()
    bmt.save_checkpoint(model, path)
    with torch.no_grad():
        values: list[list[float]] = model(TOKENS).tolist()
    return values


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_process_without_ranks_reads_an_ordinary_model(world_size: int, tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt")
    expected = run_ranks(world_size, saved, path)[0]
    assert not bmt.is_initialized()
    model = torch.load(path, map_location="cpu", weights_only=False).eval()
    torch.testing.assert_close(model(TOKENS), torch.tensor(expected))
    model(TOKENS).sum().backward()
    assert model.layers[0].linear.weight.grad is not None


@on_ranks(1, 2)
def test_forward_called_by_name() -> None:
    model, plain = models.build("gpt", models.sharded()), models.build("gpt", models.plain())
    optimizer, reference = (torch.optim.Adam(m.parameters(), lr=0.01, eps=1e-3) for m in (model, plain))
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    for step in range(2):
        batch = models.batch("gpt", step)
        for trained in (model, plain):
            loss = trained.forward(*batch)
            (manager.backward if trained is model else torch.Tensor.backward)(loss)
        manager.step()
        manager.zero_grad()
        reference.step()
        reference.zero_grad()
    oracle.assert_same_weights(model, plain)


def landing_layers_in_a_file(path: str) -> bool:
    """Whether a model whose linear gradients land comes back from a file and still trains the same."""
    with mock.patch.object(linear, "_LARGE", 0):
        model = bmt.BMTrainModelWrapper(nn.Sequential(*[nn.Linear(6, 6) for _ in range(2)]))
        bmt.save_checkpoint(model, path)
        again = torch.load(path, weights_only=False)
    assert any(isinstance(m, linear.LandingLinear) for m in again.modules())
    grads = []
    for net in (model, again):
        bmt.optim.OptimManager().backward(net(torch.ones(2, 6)).square().mean())
        grads.append([bmt.gather_grad(p) for p in net.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_layers_whose_gradients_land_come_back_from_a_file(world_size: int, tmp_path: Path) -> None:
    assert all(run_ranks(world_size, landing_layers_in_a_file, str(tmp_path / "model.pt")))
