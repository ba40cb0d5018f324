"""Where in the user's code a thread is."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

import torch

_OURS = str(Path(__file__).parents[1])
_LIBRARY = sysconfig.get_path("stdlib")
_TORCH = str(Path(torch.__file__).parent)


class Place(NamedTuple):
    """A line of user code, and what it has called of ours."""

    line: str
    """As in "train.py:88"; empty where no user code runs."""
    call: str
    """As in "bmt.save"; empty where nothing of ours is called."""


def place_of_thread(thread: int) -> Place:
    """Where the thread with this identifier is now: the present one, or one that waits."""
    frame = sys._current_frames().get(thread)
    try:
        return Place("", "") if frame is None else _place(_code_of(frame))
    except AttributeError:  # code that torch compiled came to its end, and what its frame led to is no frame
        return Place("", "")
    finally:
        del (
            frame
        )  # the present thread's would hold itself, and with it all that its callers have, until it is collected


class RunningThreads:
    """Where threads are while they go on.

    Their frames may end while they are looked at, and those of code that torch compiled lead to freed memory then.
    Here they are written down at once, by what does so after a crash.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):  # which needs no disk
            self._file: IO[bytes] = os.fdopen(os.memfd_create("places"), "w+b")
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as the job

    def line_of(self, thread: int) -> str:
        """The line of user code that the thread with this identifier runs; empty if it runs none."""
        self._file.seek(0)
        self._file.truncate()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.seek(0)
        frames = []
        is_here = False
        for text in self._file.read().decode("unicode_escape").splitlines():
            if text.startswith(("Thread", "Current thread")):
                is_here = f"0x{thread:016x}" in text
            elif is_here and (found := _FRAME.match(text)):
                frames.append((found["file"], found["name"], int(found["line"])))
        return _place((file, name, line, None) for file, name, line in frames).line


_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


def place_of_error(error: BaseException) -> Place:
    """Where ``error`` was raised."""
    frames = [_seen(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return _place(reversed(frames))


_Seen = tuple[str, str, int, FrameType | None]
"""The file, the function and the line of a frame, and itself, where that is known."""


def _seen(frame: FrameType, line: int) -> _Seen:
    return frame.f_code.co_filename, frame.f_code.co_name, line, frame


def _code_of(frame: FrameType | None) -> Iterator[_Seen]:
    while frame is not None:
        yield _seen(frame, frame.f_lineno)
        frame = frame.f_back


def _place(frames: Iterable[_Seen]) -> Place:
    """Of ``frames``, the innermost first."""
    line = call = ""
    for file, name, number, frame in frames:
        if file.startswith(_OURS):
            call = "" if line or frame is None else _name(frame)
        elif not _is_library(file):
            here = f"{Path(file).name}:{number}"
            if not line:
                line = here
            if name != "forward":  # of a module: who has called it says more
                return Place(line if here == line else f"{line}, from {here}", call)
    return Place(line, call)


def _is_library(file: str) -> bool:
    if file.startswith((_TORCH, "<frozen")):
        return True
    return file.startswith(_LIBRARY) and "site-packages" not in file


def _name(frame: FrameType) -> str:
    owner, name = frame.f_locals.get("self"), frame.f_code.co_name
    if owner is None:
        return f"bmt.{name}"
    return "" if name == "__call__" else f"{type(owner).__name__}.{name}"
