"""One line on a terminal that says what is being done, from the first moment on, and goes when it is done."""

from __future__ import annotations

import time
from typing import TextIO

EVERY = 0.1  # seconds between two states that are shown
LINES = 10.0  # seconds between two lines of a log


class Log:
    """``progress("reading", 3, 10)`` where the stream is no terminal: a line now and then, of what takes long."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= LINES:
            self._said = now
            print(f"bmt-convert: {phase} {f'{done}/{total}' if total else done}", file=self._stream, flush=True)


class Progress:
    """``progress("reading", 3, 10)`` where the stream is a terminal; nothing elsewhere. ``total`` 0: not known yet."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = stream.isatty()
        self._width = 0
        self._phase, self._began, self._last = "", 0.0, 0.0

    def __enter__(self) -> Progress:
        self("looking for files", 0, 0)
        return self

    def __exit__(self, *error: object) -> None:
        self._write("")

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began = phase, now
        elif now - self._last < EVERY and done != total:
            return
        self._last = now
        count = f"{done}/{total}" if total else f"{done}" if done else ""
        spent = now - self._began
        left = f", {spent / done * (total - done):.0f} s left" if 0 < done < total and spent > 2 else ""
        self._write(f"{phase} {count}{left}".rstrip())

    def _write(self, text: str) -> None:
        if self._shown:
            gap = " " * max(self._width - len(text), 0)
            self._stream.write(f"\r{text}{gap}" if text else f"\r{gap}\r")
            self._stream.flush()
            self._width = len(text)
