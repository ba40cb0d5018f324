"""Schedules against their formulas, at the edges where a formula divides by zero, and across a save."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bmtrain import lr_scheduler
from bmtrain.errors import ConfigurationError

LR, WARMUP, END = 0.3, 4, 20
STEPS = range(26)

FORMULAS: dict[str, Any] = {
    "NoDecay": lambda n: LR * n / WARMUP if n < WARMUP else LR,
    "Noam": lambda n: LR / math.sqrt(WARMUP) * n / WARMUP if n < WARMUP else LR / math.sqrt(n),
    "Linear": lambda n: LR * n / WARMUP if n < WARMUP else max(0.0, LR * (END - n) / (END - WARMUP)),
    "Cosine": lambda n: (
        LR * n / WARMUP if n < WARMUP else LR * (1 + math.cos(math.pi * (n - WARMUP) / (END - WARMUP))) / 2
    ),
    "Exponential": lambda n: LR * n / WARMUP if n < WARMUP else LR * 0.95 ** (n - WARMUP),
}


def make_optimizer() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=99.0)


@pytest.mark.parametrize("name", FORMULAS)
def test_rates_follow_the_formula(name: str) -> None:
    optimizer = make_optimizer()
    scheduler = getattr(lr_scheduler, name)(optimizer, LR, WARMUP, END, 0)
    rates = []
    for _ in STEPS:
        assert [group["lr"] for group in optimizer.param_groups] == [scheduler.current_lr] * 2
        assert scheduler.get_lr() == scheduler.current_lr
        rates.append(scheduler.current_lr)
        scheduler.step()
    assert rates == pytest.approx([FORMULAS[name](n) for n in STEPS], abs=1e-15)
    assert scheduler.num_iter == len(STEPS)


@pytest.mark.parametrize("name", FORMULAS)
def test_starting_late_or_jumping_gives_the_same_rate(name: str) -> None:
    late = getattr(lr_scheduler, name)(make_optimizer(), LR, WARMUP, END, 11)
    assert late.current_lr == pytest.approx(FORMULAS[name](11))
    late.step(2)
    assert late.current_lr == pytest.approx(FORMULAS[name](2))


@pytest.mark.parametrize("name", FORMULAS)
def test_state_continues_the_schedule(name: str) -> None:
    options = {"gamma": 0.5} if name == "Exponential" else {}
    first = getattr(lr_scheduler, name)(make_optimizer(), LR, WARMUP, END, 7, **options)
    optimizer = make_optimizer()
    second = getattr(lr_scheduler, name)(optimizer, 1.0, 1, 2, 0)
    second.load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == first.current_lr
    first.step()
    second.step()
    assert second.current_lr == first.current_lr and second.num_iter == 8


def test_a_state_without_gamma_keeps_the_present_one() -> None:
    state = lr_scheduler.Exponential(make_optimizer(), LR, WARMUP, END, 7).state_dict()
    del state["gamma"]
    scheduler = lr_scheduler.Exponential(make_optimizer(), LR, WARMUP, END, 0, gamma=0.5)
    scheduler.load_state_dict(state)
    assert scheduler.current_lr == pytest.approx(LR * 0.5**3)


def test_no_division_by_zero() -> None:
    noam = lr_scheduler.Noam(make_optimizer(), LR, 0, END)
    assert noam.current_lr == LR
    linear = lr_scheduler.Linear(make_optimizer(), LR, 5, 5)
    rates = [linear.current_lr]
    for _ in range(6):
        linear.step()
        rates.append(linear.current_lr)
    assert rates == pytest.approx([0, 0.06, 0.12, 0.18, 0.24, 0, 0])
    cosine = lr_scheduler.Cosine(make_optimizer(), LR, 5, 5, 5)
    assert cosine.current_lr == LR
    for name in FORMULAS:
        assert math.isfinite(getattr(lr_scheduler, name)(make_optimizer(), LR, 0, 0, 0).current_lr)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="-1"):
        lr_scheduler.NoDecay(make_optimizer(), LR, WARMUP, END, -1)


def test_the_peak_of_noam() -> None:
    rates = []
    noam = lr_scheduler.Noam(make_optimizer(), LR, 9, END)
    for _ in STEPS:
        rates.append(noam.current_lr)
        noam.step()
    assert max(rates) == pytest.approx(LR / 3) and rates.index(max(rates)) == 9


def test_a_schedule_of_ones_own() -> None:
    class Halving(lr_scheduler.WarmupLRScheduler):
        def get_lr_decay(self, num_iter: int) -> float:
            return self.start_lr / 2

    scheduler = Halving(make_optimizer(), LR, 2, END)
    scheduler.step()
    assert scheduler.current_lr == LR / 2
    scheduler.step()
    assert scheduler.current_lr == LR / 2
    with pytest.raises(TypeError):
        lr_scheduler.WarmupLRScheduler(make_optimizer(), LR, 2, END)  # type: ignore[abstract]
