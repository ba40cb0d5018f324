"""``optimizer.state`` of torch's optimizers over sharded parameters is that of whole ones, to read and to change."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from test_adam_view import CHANGES, build, forgets_all, gets_an_empty_one

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import UnsupportedError


def managed(optimizer: torch.optim.Optimizer) -> bmt.optim.OptimManager:
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    return manager


def train(model: Any, manager: bmt.optim.OptimManager, step: int = 0) -> None:
    x = oracle.inputs(step).to(context().device.torch_device)
    manager.zero_grad()
    manager.backward(oracle.mean(model(x.chunk(bmt.world_size())[bmt.rank()])))
    manager.step()


@on_ranks(2)
def test_what_one_rank_keeps_is_not_shown() -> None:
    class LARS(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("norm", torch.zeros_like(p)).add_(p.grad / p.grad.norm())
                    p.sub_(self.state[p]["norm"], alpha=0.01)

    model = bmt.BMTrainModelWrapper(build())
    optimizer = LARS(model.parameters())
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer, step_on="tensors")
    train(model, manager)
    for read in (lambda: optimizer.state[model[0].weight], lambda: list(optimizer.state.values())):
        with pytest.raises(UnsupportedError, match="its owner"):
            read()
    assert all(state["norm"].shape == p.shape for state, p in zip(whole(optimizer), model.parameters(), strict=True))
    optimizer.state.clear()
    train(model, manager)


def whole(optimizer: torch.optim.Optimizer) -> list[Any]:
    return list(optimizer.state_dict()["state"].values())


@on_ranks(1, 2)
def test_changes_are_torchs() -> None:
    device = context().device.torch_device
    for change in CHANGES:
        plain = build().to(device)
        theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
        same = forgets_all if change is gets_an_empty_one else change
        model = bmt.BMTrainModelWrapper(build())
        ours = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
        manager = managed(ours)
        for step in range(5):
            theirs.zero_grad()
            oracle.mean(plain(oracle.inputs(step).to(device))).backward()
            theirs.step()
            train(model, manager, step)
            if step == 2:
                same(theirs, plain)
                same(ours, model)
        oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["Adam", "SGD", "Adagrad", "RMSprop", "ASGD"])
def test_readings_are_of_whole_states(kind: str) -> None:
    model = bmt.BMTrainModelWrapper(build())
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, **options)
    manager = managed(optimizer)
    assert len(optimizer.state) == (4 if kind == "Adagrad" else 0)
    train(model, manager)
    copied = [copy.deepcopy(optimizer.state_dict()) for _ in range(2)][1]  # making one changes nothing of what is shown
    again = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, **options)
    managed(again)
    again.load_state_dict(copied)
    for shown in (optimizer, again):
        assert len(shown.state) == 4 and len(list(shown.state.items())) == 4
        for number, p in enumerate(model.parameters()):
            state, expected = shown.state[p], copied["state"][number]
            assert list(state) == list(expected) and state.keys() == expected.keys()
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    assert value.shape == p.shape
                    oracle.assert_close(value.norm().cpu(), expected[name].norm(), name)
                    oracle.assert_close(value.sum().cpu(), expected[name].sum(), name)
                else:
                    assert value == expected[name]


class ScheduleFree(torch.optim.Optimizer):
    """Has a second place for parameters, to which ``eval`` moves them and ``train`` back."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "steps": 0})

    @torch.no_grad()
    def move(self, weight: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(end=self.state[p]["z"], weight=weight)

    def eval(self) -> None:
        self.move(1 - 1 / 0.9)

    def train(self) -> None:
        self.move(1 - 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    z, share = self.state[p].setdefault("z", p.clone()), 1 / (group["steps"] + 1)
                    p.lerp_(end=z, weight=share).add_(p.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                    z.sub_(p.grad, alpha=group["lr"])
            group["steps"] += 1


@on_ranks(1, 2)
@pytest.mark.parametrize("step_on", [None, "shards", "whole", "tensors"])
def test_methods_beside_step_see_whole_states(step_on: Any) -> None:
    plain = build().to(context().device.torch_device)
    model = bmt.BMTrainModelWrapper(build())
    theirs, ours = ScheduleFree(plain.parameters()), ScheduleFree(model.parameters())
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(ours, step_on=step_on)
    if step_on == "tensors" and bmt.world_size() > 1:
        with pytest.raises(UnsupportedError, match="its owner"):
            ours.train()
        return
    for step in range(4):
        theirs.train()
        ours.train()
        theirs.zero_grad()
        oracle.mean(plain(oracle.inputs(step).to(context().device.torch_device))).backward()
        theirs.step()
        train(model, manager, step)
        theirs.eval()
        ours.eval()
        oracle.assert_same_weights(model, plain)
