"""The fp32 values behind low-precision parameters when several optimizers, copies and files have a hand in them."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

OURS: dict[str, Any] = {
    "adam": lambda params: bmt.optim.AdamOptimizer(params, lr=1e-2),
    "offload": lambda params: bmt.optim.AdamOffloadOptimizer(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "torch": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
}
PLAIN = OURS | {"adam": OURS["torch"], "offload": OURS["torch"]}


def make(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 90))).to(dtype)


def managed(optimizer: Any) -> bmt.optim.OptimManager:
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    return manager


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    """fp32 numbers that the model's dtype holds exactly, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype).float() for p in model.parameters()]


@on_ranks(1, 2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [("adam", "adam"), ("adam", "sgd"), ("offload", "torch"), ("sgd", "torch")])
def test_optimizers_of_the_same_parameters_follow_each_other(dtype: torch.dtype, kinds: tuple[str, str]) -> None:
    model = make(dtype)
    masters = [p.gather().detach().float().requires_grad_() for p in model.parameters()]
    managers = [managed(OURS[kind](model.parameters())) for kind in kinds]
    theirs = [PLAIN[kind](masters) for kind in kinds]
    for step, turn in enumerate((0, 1, 0, 1, 1, 0, 0)):
        for parameter, master, grad in zip(model.parameters(), masters, gradients(model, step), strict=True):
            parameter.grad, master.grad = grad, grad.clone()
        managers[turn].step()
        managers[turn].zero_grad()
        theirs[turn].step()
    for (name, parameter), master in zip(model.named_parameters(), masters, strict=True):
        oracle.assert_close(
            parameter.gather().detach().float(), master.detach(), name, 1e-5 if dtype == torch.float32 else 2e-2
        )


@on_ranks(1, 2)
@pytest.mark.parametrize("way", ["shards", "tensors", "whole"])
@pytest.mark.parametrize("kind", ["adam", "offload", "torch"])
def test_states_that_were_loaded_before_a_manager_came_are_of_fp32_values(kind: str, way: Any) -> None:
    model, later, seen = make(torch.bfloat16), torch.optim.AdamW, list[torch.Tensor]()
    optimizer = OURS[kind](model.parameters())
    manager = managed(optimizer)
    for step in range(4):
        if step == 2:
            state = optimizer.state_dict()
            optimizer, manager = later(model.parameters(), lr=1e-2, weight_decay=0.0), bmt.optim.OptimManager()
            optimizer.load_state_dict(state)  # torch rounds it to what the parameters show
            manager.add_optimizer(optimizer, step_on=way)
        for parameter, grad in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = grad
        manager.step()
        manager.zero_grad()
        seen = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    assert {value.dtype for value in seen} == {torch.float32}
    for value, *grads in zip(seen, *(gradients(model, step) for step in range(4)), strict=True):
        expected = sum(0.1 * 0.9 ** (3 - step) * grad for step, grad in enumerate(grads))
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kinds", [("adam", "adam"), ("sgd", "adam"), ("torch", "sgd")])
@on_ranks(2)
def test_optimizers_share_digits_on_several_ranks(kinds: tuple[str, str]) -> None:
    """Steps too small for bfloat16 add up, whoever takes them."""
    model = make(torch.bfloat16)
    with bmt.gathered(model, write=True), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizers = [OURS[kind](model.parameters()) for kind in kinds]
    managers = [managed(optimizer) for optimizer in optimizers]
    for step in range(40):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-4
        for parameter in model.parameters():
            parameter.grad = torch.ones(parameter.shape)
        managers[step % 2].step()
        managers[step % 2].zero_grad()
    for parameter in model.parameters():
        assert float((parameter.gather().float() - 0.996).abs().max()) <= 2**-9


@on_ranks(1, 2, 3)
def test_a_run_started_again_is_the_same() -> None:
    """A state without masters (torch's own, or one from before the first step) starts from what the model shows."""
    model = make(torch.bfloat16)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = OURS["adam"](model.parameters())
    fresh, manager = optimizer.state_dict(), managed(optimizer)

    def steps() -> dict[str, torch.Tensor]:
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3
            for parameter, grad in zip(model.parameters(), gradients(model, step), strict=True):
                parameter.grad = grad
            manager.step()
            manager.zero_grad()
        masters: dict[str, torch.Tensor] = {str(k): s["master"] for k, s in optimizer.state_dict()["state"].items()}
        return masters

    once = steps()
    for _ in range(2):
        model.load_state_dict(first)
        optimizer.load_state_dict(fresh)
        again = steps()
        assert all(torch.equal(again[key], value) for key, value in once.items())


@on_ranks(1, 2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adam", "offload"])
def test_optimizers_are_copied_with_their_models(dtype: torch.dtype, kind: str) -> None:
    """A model and its optimizer, copied together, go on alike and apart."""
    model = make(dtype)
    optimizer = OURS[kind](model.parameters())

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        for parameter, grad in zip(model.parameters(), gradients(model, number), strict=True):
            parameter.grad = grad
        manager = managed(optimizer)
        manager.step()
        manager.zero_grad()

    step(model, optimizer, 0)
    other, others = copy.deepcopy((model, optimizer))
    assert {id(p) for p in other.parameters()} == {id(p) for g in others.param_groups for p in g["params"]}
    step(model, optimizer, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(other, others, 1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) and torch.equal(other.state_dict()[key], value), key
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(others.state_dict()["state"][number][name], value)
