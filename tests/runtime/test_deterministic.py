"""``bmt.deterministic()``: one switch, refused where it would not hold."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import on_ranks

import bmtrain as bmt
from bmtrain import context
from bmtrain.errors import ConfigurationError


@on_ranks(1, fresh=True)
def test_refusals() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(context, "is_in_use", lambda: True)
    patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ConfigurationError, match="too late"):
        bmt.deterministic()
    patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:1")
    with pytest.raises(ConfigurationError, match="':8:1'"):
        bmt.deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
    patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    bmt.deterministic()
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    patch.undo()


@on_ranks(2, fresh=True, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})  # init_distributed has used a GPU already
def test_training_goes_on_and_gives_equal_bits() -> None:
    bmt.deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
    found: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        model: Any = bmt.BMTrainModelWrapper(torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9)))
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=0.01))
        for step in range(3):
            tokens = (torch.arange(12) + step + bmt.rank()) % 9
            manager.zero_grad()
            manager.backward(torch.nn.functional.cross_entropy(model(tokens), tokens))
            manager.step()
        found.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
