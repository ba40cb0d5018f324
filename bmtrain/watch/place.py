"""Where in the user's code a thread is."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

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
    """Where the thread with this identifier is now."""
    frame = sys._current_frames().get(thread)
    try:
        return Place("", "") if frame is None else _place(_code_of(frame))
    except AttributeError:  # code that torch compiled came to its end, and what its frame led to is no frame
        return Place("", "")


def place_of_error(error: BaseException) -> Place:
    """Where ``error`` was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    lines = [line for _, line in traceback.walk_tb(error.__traceback__)]
    return _place(reversed(list(zip(frames, lines, strict=True))))


def _code_of(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _place(frames: Iterable[tuple[FrameType, int]]) -> Place:
    """Of ``frames``, the innermost first."""
    line = call = ""
    for frame, number in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_OURS):
            call = "" if line else _name(frame)
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
