"""The loss scale on the device: the same numbers as a plain loop that looks at every gradient before it steps.

A GPU tells the host of an overflow only later.  A CPU knows at once, so here it is made to tell as late as can be, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.device import Readback

STEPS = 12
OVERFLOWS = {0: float("inf"), 4: float("nan"), 5: float("-inf"), 9: float("inf")}
OPTIONS: dict[str, Any] = {
    "loss_scale": 48.0, "loss_scale_factor": 3, "loss_scale_steps": 2, "min_loss_scale": 10, "max_loss_scale": 100,
}  # fmt: skip


@contextmanager
def told(late: bool) -> Iterator[None]:
    with mock.patch.object(Readback, "comes_later", late):
        yield


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def batch(step: int) -> torch.Tensor:
    x = oracle.inputs(step)
    x[3] *= OVERFLOWS.get(step, 1.0)  # on one rank only
    return x


SCHEDULES: dict[str, Any] = {
    "ours": lambda o: bmt.lr_scheduler.Cosine(o, 1e-2, 3, 20),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
}


def plain_run(schedule: str) -> tuple[dict[str, torch.Tensor], list[float], list[float], list[float]]:
    """Weights, loss scales, learning rates and norms of a loop that any reader can check."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = SCHEDULES[schedule](optimizer)
    scale, good = OPTIONS["loss_scale"], 0
    scales, rates, norms = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        oracle.mean(model(batch(step))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        rates.append(optimizer.param_groups[0]["lr"])
        if all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
            optimizer.step()
            scheduler.step()
            good += 1
            if good == OPTIONS["loss_scale_steps"]:
                scale, good = min(scale * OPTIONS["loss_scale_factor"], OPTIONS["max_loss_scale"]), 0
        else:
            scale, good = max(scale / OPTIONS["loss_scale_factor"], OPTIONS["min_loss_scale"]), 0
        scales.append(scale)
    return model.state_dict(), scales, rates, norms


def record_rates(optimizer: Any) -> list[float]:
    """The learning rate of every step that is tried, as it comes."""
    rates, step = [], optimizer.step

    def recorded(**options: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(**options)

    optimizer.step = recorded
    return rates


def managed_run(
    schedule: str, late: bool, kind: str = "AdamOptimizer", read: bool = False, zero: bool = True
) -> tuple[dict[str, torch.Tensor], list[float], list[float], list[float], Any]:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = getattr(bmt.optim, kind)(model.parameters(), lr=1e-2)
    manager = bmt.optim.OptimManager(**OPTIONS)
    manager.add_optimizer(optimizer, SCHEDULES[schedule](optimizer))
    scales, rates, norms = [], record_rates(optimizer), []
    with told(late):
        for step in range(STEPS):
            if zero:
                manager.zero_grad()
            manager.backward(oracle.mean(model(models.share(batch(step)))))
            norms.append(float(manager.clip_grad_norm(model.parameters(), 0.05)))
            manager.step()
            if not zero and step not in OVERFLOWS:
                manager.zero_grad()  # a script that leaves dropping an overflow's gradients to the manager
            if read:
                scales.append(manager.loss_scale)
        scales = scales or [manager.loss_scale]
        return model.state_dict(), scales, rates, norms, optimizer.state_dict()


@pytest.mark.parametrize("kind", ["AdamOptimizer", "AdamOffloadOptimizer"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@on_ranks(1, 2, long=(3,))
def test_overflows_are_as_if_they_had_not_been(schedule: str, kind: str) -> None:
    weights, scales, rates, norms = plain_run(schedule)
    runs = [
        managed_run(schedule, late=late, kind=kind, read=read, zero=zero)
        for late, read, zero in ((False, True, True), (True, True, True), (True, False, True), (True, False, False))
    ]
    for found, found_scales, found_rates, found_norms, state in runs:
        assert found_scales in (scales, scales[-1:]), (found_scales, scales)
        assert found_rates == rates
        assert torch.allclose(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-4, equal_nan=True)
        for key, value in weights.items():
            oracle.assert_close(found[key], value, key, 1e-5)
        assert all(entry["step"] == STEPS - len(OVERFLOWS) for entry in state["state"].values())
    for other in runs[1:]:  # late or not makes no difference at all
        assert all(torch.equal(other[0][key], runs[0][0][key]) for key in weights)


def resumed(late: bool) -> tuple[Any, ...]:
    """State taken right after a skipped step, loaded by a second manager."""

    def make() -> tuple[nn.Module, Any, bmt.optim.OptimManager]:
        model = bmt.BMTrainModelWrapper(build())
        optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
        manager = bmt.optim.OptimManager(**OPTIONS)
        manager.add_optimizer(optimizer, SCHEDULES["ours"](optimizer))
        return model, optimizer, manager

    def run(model: nn.Module, manager: bmt.optim.OptimManager, first: int, last: int) -> None:
        for step in range(first, last):
            manager.zero_grad()
            manager.backward(oracle.mean(model(models.share(batch(step)))))
            manager.step()

    with told(late):
        straight, _, manager = make()
        run(straight, manager, 0, STEPS)
        model, _, manager = make()
        run(model, manager, 0, 6)
        weights, state = model.state_dict(), manager.state_dict()
        assert state["lr_schedulers"][0]["num_iter"] == 3 and state["steps_since_last_scale"] == 0
        model, _, manager = make()
        model.load_state_dict(weights)
        manager.load_state_dict(state)
        run(model, manager, 6, STEPS)
    oracle.assert_same_weights(model, straight, exact=True)


@pytest.mark.parametrize("late", [True, False])
def test_a_run_resumes_after_an_overflow(late: bool) -> None:
    run_ranks(2, resumed, late)


@on_ranks(1)
def test_what_is_set_by_hand_stays() -> None:
    """What a user sets stays, the scale and a learning rate."""
    model = bmt.BMTrainModelWrapper(build())
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager = bmt.optim.OptimManager(loss_scale=16.0)
    manager.add_optimizer(optimizer, SCHEDULES["ours"](optimizer))
    with told(late=True):
        manager.backward(oracle.mean(model(batch(0))))
        manager.step()
        optimizer.param_groups[0]["lr"] = 0.125
        assert manager.loss_scale == 8.0
        assert optimizer.param_groups[0]["lr"] == 0.125
        manager.loss_scale = 4
        assert manager.loss_scale == 4.0 and manager.loss_scale_enabled


def without_waiting() -> list[float]:
    model = bmt.BMTrainModelWrapper(build()).half()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager = bmt.optim.OptimManager(loss_scale=2.0**8, loss_scale_steps=2)
    manager.add_optimizer(optimizer, SCHEDULES["ours"](optimizer))
    inputs = [models.share(batch(step)).cuda().half() for step in range(STEPS)]
    scales = []
    for step, x in enumerate(inputs):
        if step == 3:  # everything is allocated, and the first batches of all ranks are compared
            torch.cuda.set_sync_debug_mode("error")
        manager.zero_grad()
        manager.backward(model(x).float().tanh().square().mean())
        manager.clip_grad_norm(model.parameters(), 0.05)
        manager.step()
    torch.cuda.set_sync_debug_mode("default")
    scales.append(manager.loss_scale)
    assert int(optimizer.state_dict()["state"][0]["step"]) == STEPS - len(OVERFLOWS)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return scales


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_waits_for_nothing_on_a_gpu(world_size: int) -> None:
    expected, good = 2.0**8, 0
    for step in range(STEPS):
        good = 0 if step in OVERFLOWS else good + 1
        expected = expected / 2 if step in OVERFLOWS else expected * 2 if good == 2 else expected
        good = 0 if good == 2 else good
    assert run_ranks(world_size, without_waiting, init={"device": "cuda"}) == [[expected]] * world_size
