"""Where in user code something is called."""

from __future__ import annotations

import sys
from types import FrameType


def users_line(frame: FrameType | None = None) -> str:
    """The line of user code that has called what runs now, or in ``frame``, as in "train.py:88"."""
    frame = sys._getframe() if frame is None else frame
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("bmtrain", "torch") and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def calling_frame() -> FrameType | None:
    """Of what has called bmtrain, beyond torch's function modes (a default device), which hand calls on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("bmtrain.", *_MODES)):
        frame = frame.f_back
    return frame


_MODES = ("torch.utils._device", "torch.overrides")
