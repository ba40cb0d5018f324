"""Ctrl-C: one line from one rank instead of a traceback from each."""

from __future__ import annotations

import signal
import sys
import threading
from types import TracebackType

from .place import place_of_error


class Interrupts:
    """From its making until ``close``, an uncaught KeyboardInterrupt ends this process without a traceback.

    The exit code stays what Python makes of it: 130, as a shell counts.  A script's own ``sys.excepthook`` stays, too.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._before = sys.excepthook
        if self._before is sys.__excepthook__:
            sys.excepthook = self._ended

    def _ended(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            self._before(kind, error, trace)
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher sends it again while this process leaves
        if self._rank == 0:
            line = place_of_error(error).line
            where = f" at {line}" if line else ""
            text = f"\nbmtrain: interrupted{where}; what bmt.save and Checkpointer have written is whole."
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give the hook back, unless somebody else has put another in its place."""
        if sys.excepthook == self._ended:
            sys.excepthook = self._before
