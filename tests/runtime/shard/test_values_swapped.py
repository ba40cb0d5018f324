"""``torch.utils.swap_tensors``, which torch calls, too, where modules are told to swap: never a value that is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(x))
        return out


def _others(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.full(p.shape, 0.5) for name, p in module.named_parameters()}


def swap_parameter(model: Model) -> None:
    torch.utils.swap_tensors(model.head.weight, nn.Parameter(torch.ones(4, 4)))


def swap_tensor(model: Model) -> None:
    torch.utils.swap_tensors(model.head.weight, torch.ones(4, 4))


def swap_other_way(model: Model) -> None:
    torch.utils.swap_tensors(nn.Parameter(torch.ones(4, 4)), model.head.weight)


def swap_two(model: Model) -> None:
    torch.utils.swap_tensors(model.head.weight, model.inner.weight)


def swap_where_whole(model: Model) -> None:
    with bmt.gathered(model.head, write=True):
        swap_parameter(model)


def load_all(model: Model) -> None:
    model.load_state_dict(_others(model))


def load_one(model: Model) -> None:
    model.head.load_state_dict(_others(model.head))


def assign_all(model: Model) -> None:
    model.load_state_dict(_others(model), assign=True)


def assign_one(model: Model) -> None:
    model.head.load_state_dict({name: nn.Parameter(value) for name, value in _others(model.head).items()}, assign=True)


def convert_one(model: Model) -> None:
    model.head.float()


def _refusal(change: Callable[[Model], None], swaps: bool) -> str:
    model = Model()
    bmt.BMTrainModelWrapper(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        change(model)
    except RuntimeError as error:
        said: Any = f"{error} {error.__cause__}"
    else:
        said = ""
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return said if same else f"changed; {said}"


@pytest.mark.parametrize("change", [swap_parameter, swap_tensor, swap_other_way, swap_two, swap_where_whole])
def test_a_swap_is_refused_before_anything_is_lost(change: Callable[[Model], None]) -> None:
    for said in [*run_ranks(2, _refusal, change, False), *run_ranks(1, _refusal, change, False)]:
        assert said.startswith("Parameter "), said
        assert "On every rank, write the values" in said


@pytest.mark.parametrize("change", [load_all, load_one, assign_one])
def test_modules_that_are_told_to_swap_do_not(change: Callable[[Model], None]) -> None:
    for said in run_ranks(2, _refusal, change, True):
        assert not said.startswith("changed"), said
        assert "set_swap_module_params_on_conversion(False)" in said


def test_a_conversion_that_would_swap_stops() -> None:
    for said in run_ranks(2, _refusal, convert_one, True):
        assert "Couldn't swap" in said and not said.startswith("changed"), said


def _assigned(change: Callable[[Model], None]) -> dict[str, torch.Tensor]:
    model = Model()
    bmt.BMTrainModelWrapper(model)
    change(model)
    return {name: value.clone() for name, value in model.state_dict().items() if "head" in name}


@pytest.mark.parametrize("change", [assign_all, assign_one])
def test_what_is_assigned_arrives(change: Callable[[Model], None]) -> None:
    for state in run_ranks(2, _assigned, change):
        assert all(bool((value == 0.5).all()) for value in state.values())
