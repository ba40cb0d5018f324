"""Gradients are means over ranks whoever runs the backward: plain torch on the whole batch is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt


def small(names: models.Names) -> Any:
    class Layer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(oracle.WIDTH, oracle.WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.lin(x))

    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.shift = names.Parameter(torch.linspace(-1, 1, oracle.WIDTH))
            self.layers = names.stack([Layer() for _ in range(2)])
            self.head = nn.Linear(oracle.WIDTH, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x + self.shift)

    return Model()


class Side:
    """One of the two models with its data and its ways to run a backward."""

    def __init__(self, model: Any, manager: bmt.optim.OptimManager | None) -> None:
        self.model, self.manager = model, manager

    def loss(self, step: int) -> torch.Tensor:
        return oracle.mean(self.model(self.x(step)))

    def x(self, step: int) -> torch.Tensor:
        x = oracle.inputs(step)
        return x if self.manager is None else models.share(x)

    def managed(self, loss: torch.Tensor) -> None:
        if self.manager is None:
            loss.backward()
        else:
            self.manager.backward(loss)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.manager is None else self.manager.scale_loss(loss)

    def clip(self) -> None:
        if self.manager is None:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        else:
            self.manager.clip_grad_norm(self.model.parameters(), 0.1)


def plain_twice(side: Side) -> None:
    side.loss(0).backward()
    side.loss(1).backward()


def plain_then_managed(side: Side) -> None:
    side.loss(0).backward()
    side.managed(side.loss(1))
    side.loss(2).backward()


def scaled_then_plain(side: Side) -> None:
    side.scaled(side.loss(0)).backward()
    side.loss(1).backward()


def forwards_before_backwards(side: Side) -> None:
    one, two, three = side.loss(0), side.loss(1), side.loss(2)
    two.backward()
    side.managed(one)
    three.backward()


def several_losses_at_once(side: Side) -> None:
    torch.autograd.backward([side.loss(0), side.loss(1)])
    torch.autograd.backward([side.scaled(side.loss(2)), side.loss(3)])


def scaled_by_hand(side: Side) -> None:
    (side.loss(0) * 4).backward()


def clipped_between(side: Side) -> None:
    side.loss(0).backward()
    side.clip()
    side.loss(1).backward()
    side.managed(side.loss(2))


def no_module_ran(side: Side) -> None:
    F.linear(side.x(0), side.model.shift).tanh().mean().backward()
    side.managed(side.loss(1))
    F.linear(side.x(2), side.model.shift).tanh().mean().backward()


def only_no_module_ran(side: Side) -> None:
    F.linear(side.x(0), side.model.shift).tanh().mean().backward()


def gradient_penalty(side: Side) -> None:
    x = side.x(0).requires_grad_()
    out = side.model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (oracle.mean(out) + slope.square().sum(1).mean()).backward()
    side.loss(1).backward()


def a_backward_within_a_backward(side: Side) -> None:
    x = side.x(1)  # a GPU's backward has a thread of its own, where no default device is set

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                oracle.mean(side.model(x)).backward()
            return grad

    side.managed(Inner.apply(side.loss(0)))  # type: ignore[no-untyped-call]


def checkpointed_by_torch(side: Side) -> None:
    from torch.utils.checkpoint import checkpoint

    for reentrant in (True, False):
        out = checkpoint(side.model, side.x(0).requires_grad_(), use_reentrant=reentrant)
        oracle.mean(out).backward()


def an_error_midway(side: Side) -> None:
    def fail(grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("midway")

    out = side.model(side.x(0))
    out.register_hook(fail)
    with pytest.raises(RuntimeError, match="midway"):
        side.managed(oracle.mean(out))
    for p in side.model.parameters():
        p.grad = None
    side.loss(1).backward()


def a_replaced_gradient(side: Side) -> None:
    side.loss(0).backward()
    for p in side.model.parameters():
        p.grad = torch.ones(p.shape)
    side.loss(1).backward()


CASES: list[Callable[[Side], None]] = [
    plain_twice, plain_then_managed, scaled_then_plain, forwards_before_backwards, several_losses_at_once,
    scaled_by_hand, clipped_between, no_module_ran, only_no_module_ran, gradient_penalty, a_backward_within_a_backward,
    checkpointed_by_torch, an_error_midway, a_replaced_gradient,
]  # fmt: skip


@pytest.mark.parametrize("recompute", [True, False])
@on_ranks(1, 3, long=(2,))
def test_any_mixture_gives_the_mean(recompute: bool) -> None:
    wrong = []
    for case in CASES:
        reference, model = oracle.pair(small, recompute)
        theirs, ours = Side(reference, None), Side(model, bmt.optim.OptimManager())
        case(theirs)
        case(ours)
        try:
            oracle.assert_same_grads(model, reference)
        except AssertionError as error:
            wrong.append(f"{case.__name__}: {error}")
    assert not wrong, wrong


@on_ranks(1, 2, 3)
def test_two_models_in_one_graph() -> None:
    pairs = [oracle.pair(small, seed=seed) for seed in (5, 6)]
    for models_of_side, manager in zip(zip(*pairs, strict=True), (None, bmt.optim.OptimManager()), strict=True):
        one, two = models_of_side
        first, second = Side(one, manager), Side(nn.Sequential(one, nn.Linear(3, oracle.WIDTH, bias=False)), manager)
        nn.init.ones_(second.model[1].weight)
        both = two(second.model(first.x(0)))
        oracle.mean(both).backward()
        first.managed(oracle.mean(two(first.x(1))))
    for reference, model in pairs:
        oracle.assert_same_grads(model, reference)


@on_ranks(1, 2, 3)
def test_the_published_factor_of_a_manager() -> None:
    reference, model = oracle.pair(small)
    Side(reference, None).loss(0).backward()
    manager = bmt.optim.OptimManager(grad_scale=1)
    manager.backward(Side(model, manager).loss(0))
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        found = bmt.gather_grad(ours)
        assert found is not None and theirs.grad is not None
        oracle.assert_close(found, theirs.grad * bmt.world_size(), "the sum")


@on_ranks(1, 2, 3, init={"gradients": "sum"})
def test_the_published_sum() -> None:
    reference, model = oracle.pair(small)
    theirs, ours = Side(reference, None), Side(model, bmt.optim.OptimManager())
    theirs.loss(0).backward()
    (ours.loss(0) / bmt.world_size()).backward()
    theirs.loss(1).backward()
    ours.managed(ours.loss(1))
    oracle.assert_same_grads(model, reference)


@on_ranks(1, initialize=False)
def test_other_names_of_sums_are_refused() -> None:
    with pytest.raises(bmt.errors.ConfigurationError, match="mean, sum"):
        bmt.init_distributed(gradients="average")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_ranks(1, 2, 3)
def test_our_optimizer_steps_on_the_mean(dtype: torch.dtype) -> None:
    """A plain backward and a step without a manager, norms and clipping between."""
    reference, model = oracle.pair(small)
    model.to(dtype)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2, eps=1e-3)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    for step in range(3):
        oracle.mean(model(models.share(oracle.inputs(step)).to(dtype))).backward()
        oracle.mean(reference(oracle.inputs(step))).backward()
        with pytest.deprecated_call():
            norm = bmt.optim.clip_grad_norm(model.parameters(), 0.05)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        oracle.assert_close(norm, expected, "the norm", 1e-4 if dtype == torch.float32 else 3e-2)
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        theirs.zero_grad()
    model.float()
    oracle.assert_same_weights(model, reference, limit=1e-4 if dtype == torch.float32 else 3e-2)
