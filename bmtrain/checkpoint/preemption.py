"""When a job has to make room: signals and time limits, on which all ranks agree at the same step."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ..comm import AskedLater, Communicator
from ..errors import ConfigurationError
from ..log import say

PREEMPTED = 75
"""The exit code of a job that has saved and made room; sysexits.h calls it EX_TEMPFAIL: try again later."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def seconds(text: timedelta | str) -> float:
    """Of "3h50m", "45m", "90s" or a timedelta.  Raises ConfigurationError for another text."""
    if isinstance(text, timedelta):
        return text.total_seconds()
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.replace(" ", ""))
    if match is None or not any(match.groups()):
        raise ConfigurationError(f'exit_after must be a timedelta or like "3h50m", not {text!r}.')
    return sum(int(count or 0) * unit for count, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))


class Preemption:
    """Asks all ranks, one step later, so that nobody waits for the answer.

    Args:
        exit_after: as of ``Checkpointer``.
        connect: makes the group for it; collective, called by the first ``agreed``.
    """

    def __init__(self, exit_after: timedelta | str | None, connect: Callable[[], Communicator]) -> None:
        self._deadline = None if exit_after is None else time.monotonic() + seconds(exit_after)
        self._later, self._is_connected = AskedLater("preemption", connect), False
        self._before: dict[signal.Signals, Any] = {}
        self._came, self._process = threading.Event(), os.getpid()

    def agreed(self, failed: bool) -> tuple[bool, bool]:
        """Whether some rank had to stop, and whether something had failed on some, when asked last.  Collective."""
        if not self._is_connected:
            self._later.connected()
            self._is_connected = True
            self._listen()
        had_to_stop, had_failed = self._later.answer() or (False, False)
        late = self._deadline is not None and time.monotonic() >= self._deadline
        self._later.ask([self._came.is_set() or late, failed])
        return had_to_stop, had_failed

    def ask(self) -> None:
        """Stop at the next step."""
        self._came.set()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there Python lets handlers be set
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        again = self._came.is_set() and number == signal.SIGTERM
        if again or os.getpid() != self._process:  # asked twice, or a child that was forked: go at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._came.set()

    def close(self) -> None:
        """Leave signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        self._later.close(wait=True)

    def leave(self, rank: int, step: int) -> None:
        """End this process."""
        if rank == 0:
            say(f"saved at step {step} to make room; exit code {PREEMPTED}.")
        raise SystemExit(PREEMPTED)
