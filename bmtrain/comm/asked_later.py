"""Questions to all ranks whose answer comes one step later, so that nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .base import Communicator


class AskedLater:
    """Whether something is so on any rank.

    Args:
        name: of the thread that asks.
        connect: makes the group for it; collective, called once, by ``connected``, ``ask`` or ``now``.
    """

    def __init__(self, name: str, connect: Callable[[], Communicator]) -> None:
        self._connect = connect
        self._comm: Communicator | None = None
        self._asker = ThreadPoolExecutor(1, name)
        self._asked: Future[list[bool]] | None = None

    def connected(self) -> Communicator:
        """The group.  Collective the first time."""
        if self._comm is None:
            self._comm = self._connect()
        return self._comm

    def answer(self) -> list[bool]:
        """To what was asked last, once; empty if nothing was."""
        asked, self._asked = self._asked, None
        return [] if asked is None else asked.result()

    def ask(self, flags: Sequence[bool]) -> None:
        """For each of ``flags``: is it true on any rank?  Collective."""
        self._asked = self._asker.submit(_any, self.connected(), flags)

    def now(self, flags: Sequence[bool]) -> list[bool]:
        """The same, waiting for the answer."""
        return _any(self.connected(), flags)

    def close(self, wait: bool) -> None:
        """Ask no more; ``wait`` until what was asked last is answered."""
        self._asker.shutdown(wait=wait)


def _any(comm: Communicator, flags: Sequence[bool]) -> list[bool]:
    found = torch.tensor(flags, dtype=torch.uint8, device="cpu")
    comm.all_reduce(found, "max")
    return [bool(flag) for flag in found.tolist()]
