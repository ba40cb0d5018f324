"""Buffers for whole parameters and whole gradients, each with one owner at a time.

A buffer goes back with an event; the next owner's stream waits for it.  No buffer is ever handed to two owners, so no
two streams can race for it.  On a GPU buffers stay in the pool (allocation on the step path would cost time, and
the transport registers them once); on a CPU they go back to the allocator.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from ..comm import Communicator
from ..device import Device, Event
from .arenas import Arena, Arenas
from .layout import Layout


def views_of(flat: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """Every parameter's view of a whole flat tensor."""
    return [flat[slot.start : slot.end].view(slot.shape) for slot in layout.slots]


@dataclass(eq=False)
class Buffer:
    """A flat tensor and the event after which its next owner may write it."""

    arena: Arena
    key: Hashable
    free: Event
    _views: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def tensor(self) -> torch.Tensor:
        """The flat tensor."""
        return self.arena.tensor

    def spoil(self) -> None:
        """Overwrite every parameter's place, so that whoever still reads it is found out."""
        for views in self._views.values():
            for view in views:
                if view.is_floating_point():
                    view.fill_(float("nan"))

    def views(self, layout: Layout) -> list[torch.Tensor]:
        """Every parameter's view of this buffer, made once for each layout."""
        views = self._views.get(id(layout))
        if views is None:
            with torch.inference_mode(False):  # the views outlive the caller's mode
                views = views_of(self.tensor, layout)
            self._views[id(layout)] = views
        return views


class BufferPool:
    """Buffers of one purpose, all moved by one communicator.

    Units that may share a buffer name the same key.  Two buffers serve any number of them: while one is in use, the
    other is on its way.
    """

    def __init__(self, device: Device, comm: Communicator, arenas: Arenas, zeroed: bool) -> None:
        self._device, self._comm, self._arenas, self._zeroed = device, comm, arenas, zeroed
        self._idle: dict[Hashable, deque[Buffer]] = {}
        self._made: Counter[Hashable] = Counter()
        self._users: Counter[Hashable] = Counter()

    def join(self, key: Hashable) -> None:
        """One more unit uses buffers of ``key``."""
        self._users[key] += 1

    def leave(self, key: Hashable) -> None:
        """One unit less; the last one takes the buffers along."""
        self._users[key] -= 1
        if not self._users[key]:
            self._idle.pop(key, None)
            self._made.pop(key, None)

    def acquire(self, numel: int, dtype: torch.dtype, key: Hashable, stream: torch.cuda.Stream | None) -> Buffer:
        """A buffer that work on ``stream`` may overwrite.

        With ``zeroed`` a new buffer starts as zeros; what earlier owners of the same key left is still in it.
        """
        idle = self._idle.get(key)
        # Not the one that was just given back while there may be a second: its last user is still at work on it.
        if idle and self._made[key] >= min(2, self._users[key]):
            buffer = idle.popleft()
            buffer.free.wait(stream)
            return buffer
        self._made[key] += 1
        with self._device.on(stream), torch.inference_mode(False):
            arena = self._arenas.alloc(self._comm, numel, dtype)
            if self._zeroed:
                arena.tensor.zero_()
        return Buffer(arena, key, self._device.event())

    def give_back(self, buffer: Buffer, stream: torch.cuda.Stream | None) -> None:
        """Return ``buffer``; work queued on ``stream`` so far may still use it."""
        if not self._device.is_cuda or not self._users[buffer.key]:
            return
        if self._device.schedule == "stress":
            with self._device.on(stream):
                buffer.spoil()
        buffer.free.record(stream)
        self._idle.setdefault(buffer.key, deque()).append(buffer)
