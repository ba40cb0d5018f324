"""Which hooks are told of: those that are not linear in a gradient, once, on rank 0, at their first calls."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.first_steps.linearity import watched

Hook = Callable[[torch.Tensor], Any]

MASK = torch.tensor([1.0, 0.0, 1.0, 1.0])


def _in_place(g: torch.Tensor) -> None:
    g[1:].mul_(MASK[1:])


def _clamped_in_place(g: torch.Tensor) -> None:
    g.clamp_(-0.1, 0.1)


def _into_a_view(g: torch.Tensor) -> None:
    g[:2] = g[:2].sign()


def _clipped(g: torch.Tensor) -> torch.Tensor:
    norm = float(g.norm())
    return g / norm if norm > 1 else g


def _looks(g: torch.Tensor) -> None:
    assert float(g.norm()) >= 0 and len(g.abs().topk(2)[0]) == 2 and g.tolist()


def _zero_where_nan(g: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(g) if bool(torch.isnan(g).any()) else g * 2


LINEAR: dict[str, Hook] = {
    "scaled": lambda g: 0.5 * g,
    "divided": lambda g: g / 3,
    "masked": lambda g: g * MASK,
    "filled": lambda g: g.masked_fill(MASK == 0, 0.0),
    "chosen": lambda g: torch.where(MASK > 0, g, torch.zeros_like(g)),
    "noise": lambda g: g + 0.1 * torch.randn_like(g),
    "centred": lambda g: g - g.mean(),
    "turned": lambda g: g.flip(0).roll(1),
    "projected": lambda g: g - MASK * (g @ MASK) / 3,
    "by a matrix": lambda g: torch.outer(MASK, MASK) @ g,
    "nothing": torch.zeros_like,
    "no NaN": torch.nan_to_num,
    "looked at": _looks,
    "in place": _in_place,
    "tested": _zero_where_nan,
    "itself": lambda g: g,
}
BENT: dict[str, Hook] = {
    "clamped": lambda g: g.clamp(-0.1, 0.1),
    "clamped in place": _clamped_in_place,
    "into a view": _into_a_view,
    "without gradients": lambda g: torch.clamp(g.detach(), max=0.1),
    "by its norm": lambda g: g / (1 + g.norm()),
    "by its inverse": lambda g: 1 / (g + 9),
    "signs": torch.sign,
    "squares": lambda g: g * g,
    "with its own sizes": lambda g: g * g.abs(),
    "where it is large": lambda g: g * (g.abs() > 0.1),
    "chosen by itself": lambda g: torch.where(g > 0, g, 0.0),
    "filled by itself": lambda g: g.masked_fill(g < 0, 0.0),
    "noise of its size": lambda g: g + torch.randn_like(g) * g.std(),
    "clipped": _clipped,
    "rounded": lambda g: g.mul(8).round().div(8),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_functions_are_known(name: str) -> None:
    gradient = torch.tensor([3.0, -2.0, 0.05, 1.0])
    assert watched(lambda: LINEAR[name](gradient), [gradient], list)[1] == ""


@pytest.mark.parametrize("name", BENT)
def test_functions_that_are_not_linear_are_found(name: str) -> None:
    gradient = torch.tensor([3.0, -2.0, 0.05, 1.0])
    assert watched(lambda: BENT[name](gradient), [gradient], list)[1] != ""


def said() -> dict[str, Any]:
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    calls: list[int] = []

    def signs(g: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return g.sign()

    for parameter in model.parameters():
        parameter.register_hook(signs)
    model[1].weight.register_hook(lambda g: g * 2)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    hooks: Any = model[1].weight._backward_hooks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            manager.zero_grad()
            manager.backward(model(bmt.shard_batch(torch.randn(6, 4))).square().mean())
            if step == 0:
                copied: Any = copy.deepcopy(hooks)
            manager.step()
    return {
        "said": [str(w.message) for w in caught if "not linear" in str(w.message)],
        "calls": len(calls),
        "as registered": next(iter(hooks.values())) is signs,
        "copied": next(iter(copied.values())) is signs,
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_hooks_are_told_of_once_and_stay_what_they_are(ranks: int) -> None:
    found = run_ranks(ranks, said)
    assert [len(one["said"]) for one in found] == ([1, 0] if ranks == 2 else [0])
    assert all(one["calls"] == 4 * 4 and one["as registered"] and one["copied"] for one in found)
    if ranks == 2:
        (words,) = found[0]["said"]
        assert "test_first_hooks.py:" in words and "p.grad" in words and "(sign)" in words


def pickled() -> bool:
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(4, 4)))
    model[0].register_full_backward_hook(_backward)
    model(torch.ones(2, 4)).mean().backward()
    return bool(
        pickle.loads(pickle.dumps(model[0]._backward_hooks)) == dict.fromkeys(model[0]._backward_hooks, _backward)
    )


def _backward(module: nn.Module, *_: object) -> None:
    pass


@pytest.mark.parametrize("ranks", [1, 2])
def test_hooks_are_pickled_as_they_are(ranks: int) -> None:
    assert run_ranks(ranks, pickled) == [True] * ranks
