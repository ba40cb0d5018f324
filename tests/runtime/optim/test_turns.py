"""Optimizers that take turns under one loss scale, and gradients read before the step: as with torch's GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError

STEPS, SCALE = 4, 1024.0


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())  # type: ignore[no-any-return]


def build() -> Two:
    torch.manual_seed(3)
    return Two()


class Torchs:
    """A GradScaler, by the names that the manager has."""

    def __init__(self, model: Two) -> None:
        kind = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(kind, init_scale=SCALE, growth_interval=2)
        self.first = torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9)
        self.second = torch.optim.AdamW(model.head.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, *chosen: Any) -> None:
        for one in chosen or (self.first, self.second):
            self.scaler.unscale_(one)

    def step(self, *chosen: Any) -> None:
        for one in chosen or (self.first, self.second):
            self.scaler.step(one)

    def clip(self, parameters: list[Any]) -> None:
        nn.utils.clip_grad_norm_(parameters, 0.05)

    def over(self) -> None:
        self.scaler.update()
        self.first.zero_grad()
        self.second.zero_grad()


class Ours(Torchs):
    def __init__(self, model: Two) -> None:
        self.manager = bmt.optim.OptimManager(loss_scale=SCALE, loss_scale_steps=2)
        self.first = torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9)
        self.second = bmt.optim.AdamOptimizer(model.head.parameters(), lr=1e-2, eps=1e-4)
        self.manager.add_optimizer(self.first)
        self.manager.add_optimizer(self.second)
        self.backward, self.unscale, self.step = self.manager.backward, self.manager.unscale, self.manager.step

    def clip(self, parameters: list[Any]) -> None:
        self.manager.clip_grad_norm(parameters, 0.05)

    def over(self) -> None:
        self.first.zero_grad()
        self.second.zero_grad()


def together(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.step()


def one_by_one(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.step(k.first)
    k.step(k.second)


def in_turns(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.step(k.first)
    k.second.zero_grad()
    k.backward(loss() * 2)
    k.step(k.second)


def the_first_alone(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.step(k.first)


def clipped_by_value(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.unscale()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    k.step()


def one_clipped_by_value(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.unscale(k.second)
    nn.utils.clip_grad_value_(model.head.parameters(), 1e-3)
    k.step(k.first)
    k.step(k.second)


def noise_then_clip(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.unscale()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(0.01)
    k.clip(list(model.parameters()))
    k.step()


def left_out(k: Any, model: Two, loss: Callable[[], torch.Tensor]) -> None:
    k.backward(loss())
    k.unscale(k.first)
    k.first.zero_grad()
    k.second.zero_grad()
    k.over()
    k.backward(loss())
    k.unscale(k.first)
    nn.utils.clip_grad_value_(model.body.parameters(), 1e-3)
    k.step()


LOOPS = [
    together,
    one_by_one,
    in_turns,
    the_first_alone,
    clipped_by_value,
    one_clipped_by_value,
    noise_then_clip,
    left_out,
]


def train(k: Any, model: Two, loop: Any, cut: Callable[[torch.Tensor], torch.Tensor], overflow: bool) -> None:
    for step in range(STEPS):
        x = oracle.inputs(step).to(next(model.parameters()).device)
        if overflow and step == 1:
            x[2] = float("inf")
        loop(k, model, lambda x=x: oracle.mean(model(cut(x))))
        k.over()


@on_ranks(1, 2)
def test_as_with_a_grad_scaler() -> None:
    for loop in LOOPS:
        for overflow in (False, True):
            plain = build().to(context().device.torch_device)
            train(Torchs(plain), plain, loop, lambda x: x, overflow)
            model = bmt.BMTrainModelWrapper(build())
            train(Ours(model), model, loop, lambda x: x.chunk(bmt.world_size())[bmt.rank()], overflow)
            oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_a_scale_that_stays() -> None:
    for loop in LOOPS:
        plain = build().to(context().device.torch_device)
        train(Torchs(plain), plain, loop, lambda x: x, False)
        model = bmt.BMTrainModelWrapper(build())
        ours = Ours(model)
        ours.manager = manager = bmt.optim.OptimManager()
        manager.loss_scale = SCALE
        manager.add_optimizer(ours.first)
        manager.add_optimizer(ours.second)
        ours.backward, ours.unscale, ours.step = manager.backward, manager.unscale, manager.step
        train(ours, model, loop, lambda x: x.chunk(bmt.world_size())[bmt.rank()], False)
        oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_without_a_scale_there_is_nothing_to_undo() -> None:
    model = bmt.BMTrainModelWrapper(build())
    manager = bmt.optim.OptimManager()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager.add_optimizer(optimizer)
    manager.backward(model(oracle.inputs(0)).mean())
    before = bmt.gather_grad(model.head.bias)
    manager.unscale()
    after = bmt.gather_grad(model.head.bias)
    assert before is not None and after is not None and torch.equal(before, after)


@on_ranks(1)
def test_another_optimizer_is_refused() -> None:
    model = bmt.BMTrainModelWrapper(build())
    manager = bmt.optim.OptimManager(loss_scale=SCALE)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.body.parameters()))
    other = bmt.optim.AdamOptimizer(model.head.parameters())
    for call in (manager.step, manager.unscale):
        with pytest.raises(ConfigurationError, match="does not drive that AdamOptimizer"):
            call(other)
