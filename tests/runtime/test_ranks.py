"""The harness of the other tests: a failure on a rank must reach the reader, and a failed group must not be used
again.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, free_port, on_ranks, run_ranks


def describe(scale: float) -> tuple[int, str, torch.Tensor, int]:
    rank = int(os.environ["RANK"])
    return rank, os.environ["WORLD_SIZE"], torch.ones(2) * rank * scale, os.getpid()


def draw() -> float:
    return float(torch.rand(()))


def where_and_how() -> tuple[str, bool, bool]:
    """The default device, and whether draws and comparisons are other functions than torch's."""
    patched = [hasattr(function, "__wrapped__") for function in (torch.rand, torch.equal)]
    return str(torch.get_default_device()), patched[0], patched[1]


def fail_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise KeyError("the reason")
    time.sleep(60)


def leave() -> None:
    os._exit(7)


def hang() -> None:
    time.sleep(60)


def test_results_come_in_rank_order_and_processes_are_used_again() -> None:
    first = run_ranks(2, describe, 3.0, initialize=False)
    assert [(rank, world) for rank, world, _, _ in first] == [(0, "2"), (1, "2")]
    assert torch.equal(first[1][2], torch.full((2,), 3.0))
    again = run_ranks(2, describe, 1.0, initialize=False)
    assert [entry[3] for entry in again] == [entry[3] for entry in first]
    fresh = run_ranks(2, describe, 1.0, initialize=False, fresh=True)
    assert {entry[3] for entry in fresh}.isdisjoint(entry[3] for entry in first)


def test_each_call_starts_from_the_same_seed() -> None:
    assert run_ranks(2, draw, initialize=False) == run_ranks(2, draw, initialize=False)


def test_a_test_may_go_without_a_default_device_or_draws_on_the_cpu() -> None:
    settings: dict[str, Any] = {"initialize": False, "init": {"device": "cpu"}}
    settings |= {"env": {"BMTRAIN_TEST_DEFAULT_DEVICE": "cpu:0"}}
    assert run_ranks(1, where_and_how, **settings) == [("cpu:0", True, True)]
    assert run_ranks(1, where_and_how, **settings, drawn_on_cpu=False) == [("cpu:0", False, True)]
    assert run_ranks(1, where_and_how, **settings, default_device=False) == [("cpu", False, False)]
    assert run_ranks(1, where_and_how, **settings) == [("cpu:0", True, True)]


def test_ports_differ_and_are_none_that_the_system_gives_away() -> None:
    ports = []
    for _ in range(20):
        random.seed(0)  # as tests do
        ports.append(free_port())
    assert len(set(ports)) > 15 and all(10_000 <= port < 32_000 for port in ports)


def test_a_failure_names_rank_and_reason_and_ends_the_group() -> None:
    before = run_ranks(2, describe, 1.0, initialize=False)
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1:(.|\n)*KeyError: 'the reason'(.|\n)*ranks \[0\] were still running"):
        run_ranks(2, fail_on, 1, initialize=False)
    assert time.monotonic() - start < 30
    after = run_ranks(2, describe, 1.0, initialize=False)
    assert {entry[3] for entry in before}.isdisjoint(entry[3] for entry in after)


def test_a_dead_process_and_a_hang_are_reported() -> None:
    with pytest.raises(RanksFailed, match="exit code 7"):
        run_ranks(1, leave, initialize=False)
    with pytest.raises(RanksFailed, match=r"ranks \[0\] did not finish within 1 s"):
        run_ranks(1, hang, initialize=False, timeout=1)


@on_ranks(1, 3, initialize=False)
@pytest.mark.parametrize("word", ["one", "other"])
def test_what_every_rank_does(word: str, tmp_path: Path) -> None:
    assert word in ("one", "other") and tmp_path.is_dir()
    assert int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]) in (1, 3)


@on_ranks(2, initialize=False)
def fails_on_the_last() -> None:
    assert os.environ["RANK"] == "0", "the reason"


def test_a_rank_that_fails_fails_the_test() -> None:
    assert [mark.args for mark in fails_on_the_last.pytestmark] == [("world_size", [2])]  # type: ignore[attr-defined]
    with pytest.raises(RanksFailed, match=r"rank 1:(.|\n)*AssertionError: the reason"):
        fails_on_the_last(2)


def test_a_local_function_is_refused() -> None:
    with pytest.raises(ValueError, match="top level"):
        run_ranks(1, lambda: None)
