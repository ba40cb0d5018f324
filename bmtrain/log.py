"""What the runtime says of itself: by ``logging``'s logger "bmtrain", mostly on rank 0; ``record.rank`` is the rank.

It goes to stderr as "bmtrain: ...", not into the log of a script, unless that has given this logger a handler.
Warnings are Python's own, but where a script ignores all of those they are said like the rest.  What is said while a
job ends (by the watchdog, after Ctrl-C) goes to stderr past ``logging``, whose locks may be held.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

_LOGGER = logging.getLogger("bmtrain")
_warned: set[str] = set()  # of the process, as the warnings that Python has shown are


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


def warn(text: str, stacklevel: int, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn``; once by ``say`` where the script ignores all warnings: it means those of its libraries.

    Only a filter for this text, or for the module that ``stacklevel`` names, is about what we say.
    """
    if not _ignores_all(category):
        warnings.warn(text, category, stacklevel + 1)
    elif text not in _warned:
        _warned.add(text)
        say(f"warning: {text}")


def _ignores_all(category: type[Warning]) -> bool:
    if "warnings" not in warnings.warn.__module__:  # def warn(*args, **kwargs): pass
        return True
    for action, message, of, module, line in warnings.filters:
        if message is None and module is None and not line and issubclass(category, of):
            return action == "ignore"
    return False


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
