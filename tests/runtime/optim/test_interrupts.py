"""Ctrl-C on one rank, or on all, ends training after the same step on every rank."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest
import torch

import bmtrain as bmt
from tests.runtime.ranks import RanksFailed, run_ranks


def train(steps: int, stops: dict[int, int], fails: int = -1) -> tuple[int, dict[str, torch.Tensor], bool]:
    """How many steps were done, and with which weights; ``stops`` says behind which step a rank gets Ctrl-C."""
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 1))
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    done, stopped = 0, False
    before = signal.getsignal(signal.SIGINT)
    try:
        with bmt.interrupted_together():
            for step in range(steps):
                if step == fails and bmt.rank() == 1:
                    raise ValueError("a bad sample")
                manager.zero_grad()
                manager.backward(model(torch.ones(2, 4)).square().mean())
                done += 1
                manager.step()
                if stops.get(bmt.rank()) == step:
                    os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        stopped = True
        if bmt.world_size() > 1:
            os.kill(os.getpid(), signal.SIGINT)  # as a launcher does that ends the job
    else:
        assert signal.getsignal(signal.SIGINT) is before
    return done, dict(model.state_dict()), stopped


@pytest.mark.parametrize("stops", [{0: 2}, {1: 2}, {0: 2, 1: 2}, {0: 2, 1: 3}], ids=str)
def test_ranks_stop_after_the_same_step(stops: dict[int, int]) -> None:
    one, other = run_ranks(2, train, 40, stops)
    assert one[2] and other[2] and one[0] == other[0] and 3 < one[0] <= 6
    ((_, alone, _),) = run_ranks(1, train, one[0], {})
    for _, weights, _ in (one, other):
        torch.testing.assert_close(weights, alone)


def before_any_step() -> bool:
    """Whether this rank was stopped, of which rank 1 gets Ctrl-C in a script that has nothing left to train."""
    try:
        with bmt.interrupted_together():
            if bmt.rank() == 1:
                os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        return True
    return False


def test_without_any_step() -> None:
    assert run_ranks(2, before_any_step) == [True, True]


def goes_on(steps: int) -> list[int]:
    """At which steps a script is interrupted that catches it inside of the block."""
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 1))
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    with bmt.interrupted_together():
        for step in range(steps):
            try:
                manager.zero_grad()
                manager.backward(model(torch.ones(2, 4)).square().mean())
                manager.step()
            except KeyboardInterrupt:
                found.append(step)
            if step == 2 and bmt.rank() == 1:
                os.kill(os.getpid(), signal.SIGINT)
    return found


def test_caught_inside_of_the_block() -> None:
    one, other = run_ranks(2, goes_on, 9)
    assert one == other and len(one) == 1


def test_behind_the_last_step() -> None:
    one, other = run_ranks(2, train, 3, {1: 2})
    assert one[2] and other[2] and one[0] == other[0] == 3
    assert [done[0::2] for done in run_ranks(2, train, 3, {})] == [(3, False), (3, False)]


def test_one_rank_stops_at_once() -> None:
    with suppress(KeyboardInterrupt):
        assert run_ranks(1, train, 9, {0: 2})[0][0::2] == (3, True)


def test_an_error_of_one_rank_ends_the_job() -> None:
    with pytest.raises(RanksFailed, match="a bad sample"):
        run_ranks(2, train, 9, {}, 4, timeout=60)
