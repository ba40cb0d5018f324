"""What ranks that end in the same second still find out about each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_failed_communicators import WORLD, Job, Mesh

from bmtrain.errors import RankDivergenceError
from bmtrain.watch import Entry


class Answers(Mesh):
    """The others say how far they have come when they are asked."""

    def __init__(self, job: Job, entries: dict[int, Entry]) -> None:
        super().__init__()
        self.job, self.entries = job, entries

    def wake(self) -> None:
        self.said.put((0, {}))

    def send(self, message: Any, must: bool = False) -> None:
        if "ends" in message:
            for rank, entry in self.entries.items():
                self.job.is_at(rank, "train.py:30", entry)


def ended(folder: Path, entries: dict[int, Entry]) -> float:
    """Seconds that rank 1 took to leave after one collective, while others have come to ``entries``."""
    job = Job(folder)
    mesh: Any = Answers(job, entries)
    job.mesh = job.watchdog._mesh = mesh
    job.watchdog._thread.start()
    start = time.monotonic()
    job.watchdog.leave()
    return time.monotonic() - start


def test_ranks_that_end_alike_do_not_wait(tmp_path: Path) -> None:
    assert ended(tmp_path, {0: WORLD, 2: WORLD}) < 0.25


def test_who_goes_on_with_something_else_is_not_waited_for(tmp_path: Path) -> None:
    assert 0.25 < ended(tmp_path, {0: WORLD}) < 2


def test_a_difference_in_the_last_collective(tmp_path: Path) -> None:
    with pytest.raises(RankDivergenceError, match=r"Rank 2 differs from rank 1.*one has taken 1 batch from"):
        ended(tmp_path, {0: WORLD, 2: WORLD._replace(batch=1)})


def test_who_ends_before_the_others(tmp_path: Path) -> None:
    with pytest.raises(RankDivergenceError, match="Rank 1 has ended after 1 collectives, and rank 2 has come to more"):
        ended(tmp_path, {0: WORLD, 2: WORLD._replace(number=1)})
