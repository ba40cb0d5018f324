"""Ctrl-C that all ranks take after the same step, so that what ``except KeyboardInterrupt:`` does may be for all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ..comm import AskedLater
from ..context import context, is_initialized, world_size

_TIMEOUT = timedelta(hours=2)


class _Block:
    """Asks all ranks, one step later, so that nobody waits for the answer."""

    def __init__(self) -> None:
        self.came = False
        self._later = AskedLater("interrupts", lambda: context().host_group("interrupts", _TIMEOUT))

    def handle(self, number: int, frame: Any) -> None:
        self.came = True

    def after_step(self) -> None:
        """Raises KeyboardInterrupt on every rank if some had been interrupted when asked last.  Collective."""
        if any(self._later.answer()):
            self.came = False  # a script may catch it inside of the block, and go on
            raise KeyboardInterrupt
        self._later.ask([self.came])

    def at_end(self) -> None:
        """As ``after_step``, of what came since the last step.  Collective."""
        if any(self._later.answer()) or any(self._later.now([self.came]) if is_initialized() else [self.came]):
            raise KeyboardInterrupt

    def close(self) -> None:
        self._later.close(wait=False)


@contextmanager
def interrupted_together() -> Iterator[None]:
    """Ctrl-C ends the block on all ranks after the same step: ``with bmt.interrupted_together():`` around training.

        try:
            with bmt.interrupted_together():
                train(model, optim_manager)
        except KeyboardInterrupt:
            bmt.save(model, "interrupted.pt")

    The KeyboardInterrupt comes from ``optim_manager.step()``, of the step after Ctrl-C or the one after that, on every
    rank, so that what follows may be what all ranks do.  torchrun ends ranks half a minute after Ctrl-C at the latest.
    On one rank the block is as it is without.  Collective.
    """
    ranks = world_size() if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or _running() is not None or threading.current_thread() is not threading.main_thread():
        yield  # only in the main thread Python lets handlers be set
        return
    block = _Block()
    after: Any = signal.signal(signal.SIGINT, block.handle)
    try:
        yield
        block.at_end()
    except KeyboardInterrupt:
        after = signal.SIG_IGN  # a launcher that ends the job sends it again, while this rank still does what follows
        raise
    finally:
        block.close()
        signal.signal(signal.SIGINT, signal.SIG_DFL if after is None else after)


def after_step() -> None:
    """What a step of an optimizer ends with: KeyboardInterrupt on every rank, if it is time for it."""
    block = _running()
    if block is not None:
        block.after_step()


def _running() -> _Block | None:
    """Whose handler the process has."""
    block = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return block if isinstance(block, _Block) else None
