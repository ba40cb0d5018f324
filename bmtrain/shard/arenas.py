"""Memory that a transport moves fastest, given back by all ranks together.

NCCL opens a window on such memory on every rank and must close it on every rank, while garbage is collected on each
rank in its own time.  So what is no longer used waits here until all ranks come to ``collect``.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from ..comm import Communicator
from ..context import Context


class Arena:
    """Keeps one allocation in use; drop it, and the memory may go."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Arenas:
    """All of one process's arenas, numbered in the order of allocation, which is the same on all ranks."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._shared = ctx.device.reuses_memory and ctx.world_size > 1
        self._count = 0
        self._unused: dict[int, tuple[Communicator, torch.Tensor]] = {}
        self._lost = False

    def alloc(self, comm: Communicator, numel: int, dtype: torch.dtype) -> Arena:
        """An uninitialised flat buffer for ``comm``.  Collective."""
        arena = Arena(comm.alloc(numel, dtype, self._ctx.device.torch_device))
        if self._shared:
            # The finalizer holds the tensor, so that its memory and window outlive the arena.
            weakref.finalize(arena, self._retire, self._count, comm, arena.tensor)
            self._count += 1
        return arena

    def _retire(self, *what: Any) -> None:
        number, comm, tensor = what
        self._unused[number] = (comm, tensor)

    def watch(self, module: torch.nn.Module) -> None:
        """Look for garbage once ``module``, which uses arenas, is gone."""
        if self._shared:
            weakref.finalize(module, self.look_for_garbage)

    def look_for_garbage(self) -> None:
        """When ``collect`` is called next: shards were left behind, and they hold each other."""
        self._lost = True

    def collect(self) -> None:
        """Give back what no rank uses any more.  Collective."""
        if not self._shared or not self._count:
            return
        if self._lost:  # not always, as it takes a tenth of a second
            self._lost = False
            gc.collect()
        unused = torch.zeros(self._count, dtype=torch.uint8, device="cpu")
        unused[list(self._unused)] = 1
        self._ctx.control.all_reduce(unused, "min")
        for number in unused.nonzero().flatten().tolist():
            comm, tensor = self._unused.pop(number)
            comm.release(tensor)
