"""What the runtime says of itself: by ``logging``'s logger "bmtrain", mostly on rank 0; ``record.rank`` is the rank.

It goes to stderr as "bmtrain: ...", not into the log of a script, unless that has given this logger a handler.  What is
said while a job ends (by the watchdog, after Ctrl-C) goes to stderr past ``logging``, whose locks may be held.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

_LOGGER = logging.getLogger("bmtrain")


class _OnStderr(logging.Handler):
    """On what ``sys.stderr`` is at the time, above a bar that tqdm draws there."""

    def emit(self, record: logging.LogRecord) -> None:
        write = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "write", None)
        if write is None:
            print(self.format(record), file=sys.stderr, flush=True)
        else:
            write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


def say(text: str, rank: int = 0) -> None:
    """One record of level INFO; a script changes what is shown by ``logging.getLogger("bmtrain").setLevel``."""
    if not _LOGGER.handlers:
        handler = _OnStderr()
        handler.setFormatter(logging.Formatter("bmtrain: %(message)s"))
        _LOGGER.addHandler(handler)
        _LOGGER.propagate = False
    if _LOGGER.level == logging.NOTSET:
        _LOGGER.setLevel(logging.INFO)
    _LOGGER.info("%s", text, extra={"rank": rank})


def interruptible(name: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorator for the command ``name``: after Ctrl-C it ends with one line, and 130, as a shell counts."""

    def decorate(command: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt:
                print(f"\n{name}: interrupted; no file was left half written", file=sys.stderr)
                return 130

        return run

    return decorate
