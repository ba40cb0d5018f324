"""What a rank has done last, in memory that was taken once."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple


class Entry(NamedTuple):
    """One collective: the same under the same number on every rank, but for ``time``."""

    number: int
    group: str
    """Which communicator, or "order" where ranks ask each other through the store."""
    operation: str
    size: int
    """Bytes of this rank's part."""
    unit: str
    """The unit that is gathered or reduced, or what ranks meet at; empty where neither is."""
    phase: str
    kind: str
    step: int
    """Optimizer steps made before."""
    batch: int
    """Batches taken before from bmt.shard_loader and bmt.shard_batch."""
    time: float
    """Seconds, as ``time.monotonic`` counts them."""


class Diary:
    """The last ``size`` collectives of this process.

    Written on the way of every collective: it stores references and integers, makes no strings, and asks nobody.  Read
    by the watchdog's thread; an entry is complete before ``count`` tells of it.

    Attributes:
        count: how many entries there have been.
        is_inside: whether a call is running that waits for other ranks.
        pair: what is sent or received there, "" for a collective; ``peer`` is the other rank, ``since`` the beginning.
        unit, phase, kind: of the entries that follow.
        step, batch: as in ``Entry``.
        is_apart: whether a stage of a pipeline runs, which does what other stages do not: nothing of that is numbered.
        saves: how many calls that write a file are running.
    """

    __slots__ = (
        "_batches", "_groups", "_kinds", "_mask", "_operations", "_phases", "_sizes", "_steps", "_times", "_units",
        "batch", "count", "is_apart", "is_inside", "kind", "pair", "peer", "phase", "saves", "since", "step", "thread",
        "unit",
    )  # fmt: skip

    def __init__(self, size: int = 1 << 14) -> None:
        assert size & (size - 1) == 0, "a power of two"
        self._mask = size - 1
        self._groups, self._operations, self._units = [""] * size, [""] * size, [""] * size
        self._phases, self._kinds = [""] * size, [""] * size
        self._sizes, self._steps, self._batches = (array("q", bytes(8 * size)) for _ in range(3))
        self._times = array("d", bytes(8 * size))
        self.thread = threading.get_ident()
        self.count = self.step = self.batch = self.saves = self.peer = 0
        self.since = 0.0
        self.is_inside = self.is_apart = False
        self.unit = self.phase = self.pair = ""
        self.kind = "start"

    def enter(self, group: str, operation: str, size: int) -> None:
        """A collective begins."""
        number = self.count
        at = number & self._mask
        self._groups[at], self._operations[at], self._sizes[at] = group, operation, size
        self._units[at], self._phases[at], self._kinds[at] = self.unit, self.phase, self.kind
        self._steps[at], self._batches[at], self._times[at] = self.step, self.batch, monotonic()
        self.count = number + 1
        self.is_inside = True

    def leave(self) -> None:
        """It is over, or on its way on the device."""
        self.pair, self.is_inside = "", False

    def enter_pair(self, pair: str, peer: int) -> None:
        """A send or receive begins.  It has no number, as not all ranks make it."""
        self.pair, self.peer, self.since, self.is_inside = pair, peer, monotonic(), True

    def refused(self) -> None:
        """The last one was not even begun: its arguments do not fit."""
        self.count -= 1

    def takes_batch(self) -> None:
        """A batch is taken.  Not counted in threads that fetch ahead, since they do so in their own time."""
        if threading.get_ident() == self.thread:
            self.batch += 1

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside the ``with`` a file is written."""
        kind, self.kind = self.kind, "save"
        self.saves += 1
        try:
            yield
        finally:
            self.saves -= 1
            self.kind = kind

    def entry(self, number: int) -> Entry | None:
        """Entry ``number``, if it is one of the last."""
        if not max(0, self.count - self._mask) <= number < self.count:
            return None
        at = number & self._mask
        return Entry(
            number, self._groups[at], self._operations[at], self._sizes[at], self._units[at], self._phases[at],
            self._kinds[at], self._steps[at], self._batches[at], self._times[at],
        )  # fmt: skip

    def last(self, count: int) -> list[Entry]:
        """The last ``count`` entries, oldest first."""
        entries = (self.entry(number) for number in range(max(0, self.count - count), self.count))
        return [entry for entry in entries if entry is not None]
