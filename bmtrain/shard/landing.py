"""Where whole gradients land before they are reduced, instead of being computed elsewhere and copied."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .layout import Layout
from .pools import Buffer


class Landing:
    """The reduction buffer of one flat shard, taken from the pool when the first gradient comes."""

    def __init__(self, layout: Layout, acquire: Callable[[], Buffer]) -> None:
        self._layout, self._acquire = layout, acquire
        self._buffer: Buffer | None = None
        self._landed = [False] * len(layout.slots)

    def place(self, index: int) -> tuple[torch.Tensor, bool]:
        """Where a whole gradient of parameter ``index`` goes, and whether it is the first to come."""
        if self._buffer is None:
            self._buffer = self._acquire()
        first, self._landed[index] = not self._landed[index], True
        return self._buffer.views(self._layout)[index], first

    def take(self) -> tuple[Buffer, list[bool]]:
        """The buffer to reduce, and which parameters' gradients are in it already."""
        buffer, landed = self._buffer or self._acquire(), self._landed
        self._buffer, self._landed = None, [False] * len(landed)
        return buffer, landed

    def forget(self, index: int) -> None:
        """Nothing of a backward that an exception ended is wanted."""
        self._landed[index] = False

    def forget_all(self) -> None:
        """The same for all parameters."""
        self._landed = [False] * len(self._landed)

    def drop(self) -> None:
        """The buffer goes, and what is in it."""
        self._buffer = None
        self.forget_all()

    @property
    def is_used(self) -> bool:
        """Whether whole gradients wait in the buffer."""
        return self._buffer is not None and any(self._landed)
