"""Buffers for whole parameters and whole gradients, each with one owner at a time.

A buffer goes back with an event; the next owner's stream waits for it.  No buffer is ever handed to two owners, so no
two streams can race for it.  On a GPU buffers stay in the pool (allocation on the step path would cost time, and
the transport registers them once); on a CPU they go back to the allocator.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from ..comm import Communicator
from ..device import Device, Event


@dataclass(eq=False)
class Buffer:
    """A flat tensor and the event after which its next owner may write it."""

    tensor: torch.Tensor
    key: Hashable
    free: Event
    views: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Parameter views into this buffer by layout, made once."""


class BufferPool:
    """Buffers of one purpose, all moved by one communicator."""

    def __init__(self, device: Device, comm: Communicator, zeroed: bool) -> None:
        self._device, self._comm, self._zeroed = device, comm, zeroed
        self._idle: dict[Hashable, list[Buffer]] = {}

    def acquire(self, numel: int, dtype: torch.dtype, key: Hashable, stream: torch.cuda.Stream | None) -> Buffer:
        """A buffer that work on ``stream`` may overwrite.  ``key`` names what may share it: equal layouts.

        With ``zeroed`` a new buffer starts as zeros; what earlier owners of the same key left is still in it.
        """
        idle = self._idle.get((numel, dtype, key))
        if idle:
            buffer = idle.pop()
            buffer.free.wait(stream)
            return buffer
        with self._device.on(stream):
            tensor = self._comm.alloc(numel, dtype, self._device.torch_device)
            if self._zeroed:
                tensor.zero_()
        return Buffer(tensor, (numel, dtype, key), self._device.event())

    def give_back(self, buffer: Buffer, stream: torch.cuda.Stream | None) -> None:
        """Return ``buffer``; work queued on ``stream`` so far may still use it."""
        if not self._device.is_cuda:
            return
        buffer.free.record(stream)
        self._idle.setdefault(buffer.key, []).append(buffer)

    def clear(self) -> None:
        """Drop every idle buffer."""
        self._device.synchronize()
        self._idle.clear()
