"""``optimizer.state`` of an AdamOptimizer is what torch's AdamW has there, to read and to change."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import UnsupportedError


def build() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def forgets_all(optimizer: Any, model: Any) -> None:
    optimizer.state.clear()


def gets_an_empty_one(optimizer: Any, model: Any) -> None:
    optimizer.state = {}


def halves_moments(optimizer: Any, model: Any) -> None:
    for p in model.parameters():
        state = optimizer.state[p]
        if "exp_avg" in state:
            state["exp_avg"].mul_(0.5)
            state["exp_avg_sq"].zero_()


def assigns_moments(optimizer: Any, model: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"] * 0.5
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])


def moves_to_where_they_are(optimizer: Any, model: Any) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.to(value.device)


def forgets_one(optimizer: Any, model: Any) -> None:
    del optimizer.state[model[2].weight]
    assert model[2].weight not in optimizer.state and len(optimizer.state) == 3


def sets_one(optimizer: Any, model: Any) -> None:
    zeros = torch.zeros(8, 6, device=context().device.torch_device)
    optimizer.state[model[0].weight] = {"step": torch.tensor(1.0), "exp_avg": zeros, "exp_avg_sq": zeros + 0.5}


def counts_anew(optimizer: Any, model: Any) -> None:
    optimizer.state[model[0].weight]["step"].fill_(1.0)
    optimizer.state[model[0].bias]["step"] = torch.tensor(7.0)


def takes_one_and_puts_it_back(optimizer: Any, model: Any) -> None:
    stored = optimizer.state.pop(model[0].weight)
    assert optimizer.state.get(model[0].weight) is None and not optimizer.state[model[0].weight]
    stored["exp_avg"] = stored["exp_avg"] * 2
    optimizer.state[model[0].weight] = stored


CHANGES = [
    forgets_all, gets_an_empty_one, halves_moments, assigns_moments, moves_to_where_they_are, forgets_one, sets_one,
    counts_anew, takes_one_and_puts_it_back,
]  # fmt: skip


@on_ranks(1, 2)
def test_changes_are_torchs() -> None:
    device = context().device.torch_device
    for change in CHANGES:
        plain = build().to(device)
        theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
        same = forgets_all if change is gets_an_empty_one else change  # torch's needs a dict that makes entries
        model = bmt.BMTrainModelWrapper(build())
        ours = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2, eps=1e-4)
        for step in range(5):
            x = oracle.inputs(step).to(device)
            for net, optimizer, given in ((plain, theirs, x), (model, ours, x.chunk(bmt.world_size())[bmt.rank()])):
                optimizer.zero_grad()
                oracle.mean(net(given)).backward()
                optimizer.step()
            if step == 2:
                same(theirs, plain)
                change(ours, model)
        oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_readings_are_of_whole_moments() -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    assert len(optimizer.state) == 0 and not optimizer.state[model[0].weight]
    oracle.mean(model(oracle.inputs(0))).backward()
    optimizer.step()
    whole = optimizer.state_dict()["state"]
    for number, p in enumerate(model.parameters()):
        state = optimizer.state[p]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"] and state["exp_avg"].shape == p.shape
        assert float(state["step"]) == 1
        assert torch.allclose(state["exp_avg"].norm().cpu(), whole[number]["exp_avg"].norm())
    with pytest.raises(UnsupportedError, match="keeps no 'z'"):
        optimizer.state[model[0].weight]["z"] = 1
