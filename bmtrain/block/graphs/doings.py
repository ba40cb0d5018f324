"""What the Python of a module does that nothing shows afterwards."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from .may_read import OURS, Executed, is_in

_KERNELS = ("flash_attn", "xformers")  # packages of functions that keep nothing
_EFFECTS: dict[str, tuple[str, ...] | None] = {
    "time": None,
    "_io": None,
    "_socket": None,
    "_queue": None,
    "_warnings": ("warn", "warn_explicit"),
    "builtins": ("print", "input", "open"),
    "datetime": ("now", "utcnow", "today"),
    "posix": ("write", "open", "urandom", "system", "mkdir", "remove", "unlink", "rename", "replace"),
}
"""By module, functions that do something, or give something else, each time that they are called; None: all."""

_COLLECTIVES = ("torch.distributed.c10d_logger", "torch.distributed._functional_collectives", "bmtrain.comm")


class Doings:
    """Looks at what the Python inside the ``with`` calls, on this thread.

    Attributes:
        executed: the functions.
        found: what it does that nothing shows afterwards, and that a recording would not do again.
        unseen: what it calls that may read or do more than is seen.
    """

    def __init__(self) -> None:
        self.executed: Executed = {}
        self.found: str | None = None
        self.unseen: str | None = None
        self._before: Any = None

    def __enter__(self) -> Doings:
        self._before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _note(self, frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            code, module = frame.f_code, _module_of(frame)
            if module.startswith(_COLLECTIVES):
                self.found = self.found or "talks to other ranks"
            if code not in self.executed and not is_in(module, (*OURS, *sys.stdlib_module_names)):
                self.executed[code] = frame.f_globals
        elif event == "c_call" and self.found is None:
            owner, name = getattr(what, "__self__", None), what.__name__
            module = what.__module__ or getattr(owner, "__module__", None) or type(owner).__module__
            names = _EFFECTS.get(module, ())
            if (names is None or name in names) and not is_in(_asker(frame), OURS):
                self.found = f"calls {name}"
            elif self.unseen is None and not is_in(module, (*OURS, *_KERNELS, *sys.stdlib_module_names)):
                if not is_in(_asker(frame), (*OURS, *_KERNELS)):
                    self.unseen = f"it calls {module}.{name}, which does not show what it reads"


def _module_of(frame: FrameType) -> str:
    """The module of the code in ``frame``; of code that was made by some other's, that one's."""
    asker: FrameType | None = frame
    while asker is not None and not asker.f_globals.get("__name__"):
        asker = asker.f_back
    return "" if asker is None else str(asker.f_globals["__name__"])


def _asker(frame: FrameType | None) -> str:
    """The module for which the standard library runs in ``frame``."""
    module = ""
    while frame is not None:
        module = _module_of(frame)
        if not is_in(module, tuple(sys.stdlib_module_names)):
            break
        frame = frame.f_back
    return module
