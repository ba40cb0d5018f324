"""Who is named when a communicator fails: the rank that is gone, if the watchdogs' connections tell of one."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bmtrain.errors import BMTrainError, CommunicationError, RankDivergenceError
from bmtrain.watch import Diary, Entry, Hooks, Timeouts, Watchdog
from bmtrain.watch.position import Position

WORLD = Entry(0, "world", "all_reduce", 4, "", "", "training", 0, 0, 0.0)
FAILED = "Connection closed by remote peer localhost"


class Mesh:
    """What rank 1 of three hears."""

    rank, world_size = 1, 3

    def __init__(self) -> None:
        self.said: queue.Queue[tuple[int, Any]] = queue.Queue()

    def receive(self, patience: float) -> list[tuple[int, Any]]:
        said: list[tuple[int, Any]] = []
        with suppress(queue.Empty):
            while patience:  # all that is there, as a mesh gives it
                said.append(self.said.get(timeout=patience if not said else 0))
        return said

    def send(self, message: Any, must: bool = False) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class Patient(Watchdog):
    """Ends nothing."""

    def _end(self) -> None:
        pass


class Job:
    def __init__(self, folder: Path) -> None:
        self.mesh, self.diary = Mesh(), Diary(8)
        self.diary.enter("world", "all_reduce", 4)
        self.diary.leave()
        self.fails_at = float("inf")
        mesh: Any = self.mesh
        hooks = Hooks(lambda: None, self.check, lambda: False)
        self.watchdog = Patient(mesh, self.diary, Timeouts(), str(folder), hooks)

    def check(self) -> None:
        if time.monotonic() >= self.fails_at:
            raise CommunicationError(f"NCCL: {FAILED}")

    def fail(self) -> None:
        self.fails_at = time.monotonic()

    def is_at(self, rank: int, line: str, entry: Entry | None = WORLD, left: bool = False, error: str = "") -> None:
        position = Position(rank, 0 if entry is None else entry.number + 1, entry, 0.0, "", 0, False, line, "")
        message = {"left": position.message()} if left else position.message()
        self.mesh.said.put((rank, message | ({"error": error} if error else {})))

    def is_gone(self, rank: int) -> None:
        self.mesh.said.put((rank, None))

    def end(self) -> str:
        """What everybody is told."""
        deadline = time.monotonic() + 10
        while self.watchdog.verdict is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(BMTrainError) as raised:
            self.watchdog.leave()
        assert raised.type is (RankDivergenceError if "differs" in str(raised.value) else CommunicationError)
        return str(raised.value)


@contextmanager
def job(folder: Path) -> Iterator[Job]:
    made = Job(folder)
    made.watchdog.start()
    made.is_at(0, "train.py:10")
    made.is_at(2, "train.py:20")
    try:
        yield made
    finally:
        made.watchdog._stops = True


@pytest.mark.parametrize("pause", [0.0, 0.5])
def test_one_that_dies_is_named_though_its_connection_tells_later(pause: float, tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.fail()
        time.sleep(pause)
        assert it.watchdog.verdict is None
        it.is_gone(0)
        said = it.end()
    assert said.startswith("Rank 0's process is gone. The last heard of it: rank 0 is at train.py:10"), said
    assert "has failed" not in said and "ank 2 is at train.py:20" in said


def test_one_that_was_gone_before_is_named_at_once(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.is_gone(2)
        time.sleep(0.7)
        assert it.watchdog.verdict is None  # nobody waits for it
        it.fail()
        start = time.monotonic()
        assert it.end().startswith("Rank 2's process is gone.") and time.monotonic() - start < 0.9


def test_one_that_has_ended_too_early_is_named(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.fail()
        it.is_at(0, "", None, left=True)
        it.is_gone(0)
        assert it.end().startswith("Rank 0 has ended, while the others go on.")


def test_one_that_has_raised_is_named(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.fail()
        it.is_at(2, "train.py:9", left=True, error="ValueError: 3 (at train.py:9)")
        it.is_gone(2)
        assert it.end().startswith("Rank 2 has ended with ValueError: 3 (at train.py:9).")


def test_several_are_named_together(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.is_gone(0)
        it.is_gone(2)
        it.fail()
        said = it.end()
    assert "Rank 0's process is gone." in said and "Rank 2's process is gone." in said


def test_where_nobody_is_gone_the_communicator_is_named_after_a_moment(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.fail()
        start = time.monotonic()
        said = it.end()
    assert said.startswith(f"Rank 1's communicator has failed: NCCL: {FAILED}. ") and "train.py:20" in said
    assert 0.9 < time.monotonic() - start < 3


def test_one_that_has_ended_after_the_same_collectives_is_no_cause(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.is_at(0, "", left=True)
        it.is_gone(0)
        it.fail()
        assert it.end().startswith("Rank 1's communicator has failed")


def test_a_failure_that_passes_is_one(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.fail()
        time.sleep(0.7)
        it.fails_at = float("inf")
        assert it.end().startswith("Rank 1's communicator has failed")


def test_ranks_that_differ_are_the_cause(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.is_at(2, "train.py:21", WORLD._replace(size=8))
        it.fail()
        assert it.end().startswith("Rank 2 differs from rank 1")


def test_what_another_rank_has_found_out_is_told(tmp_path: Path) -> None:
    with job(tmp_path) as it:
        it.fail()
        it.mesh.said.put((2, {"verdict": "Rank 0's process is gone.", "diverged": False}))
        assert it.end() == "Rank 0's process is gone."
