"""Memory that a transport moves fastest, given back by all ranks together.

NCCL opens a window on such memory on every rank and must close it on every rank, while garbage is collected on each
rank in its own time.  So what is no longer used waits here until all ranks come to ``collect``; and so does whatever
decides when memory is next taken.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import torch

from ..comm import Communicator
from ..context import Context


class Arena:
    """Keeps one allocation in use; drop it, and the memory may go."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Arenas:
    """All of one process's arenas and their users, numbered in the order of coming, which is the same on all ranks.

    Those of a stage of a pipeline come on its own ranks only, so that there is no such order: they are ordinary memory.
    """

    def __init__(self, ctx: Context, of_stage: bool = False) -> None:
        self._ctx, self._ordinary = ctx, of_stage
        self._shared = ctx.device.reuses_memory and ctx.world_size > 1 and not of_stage
        self._count = 0
        self._unused: dict[int, Callable[[], object]] = {}
        self._lost = False
        self._at: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()  # by address

    def alloc(self, comm: Communicator, numel: int, dtype: torch.dtype) -> Arena:
        """An uninitialised flat buffer for ``comm``.  Collective."""
        if self._ordinary:
            arena = Arena(torch.empty(numel, dtype=dtype, device=self._ctx.device.torch_device))
        else:
            arena = Arena(comm.alloc(numel, dtype, self._ctx.device.torch_device))
        self._at[arena.tensor.untyped_storage().data_ptr()] = arena
        if self._shared:  # what is to be done holds the tensor, so that memory and window outlive the arena
            self.when_gone(arena, partial(comm.release, arena.tensor))
        return arena

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in one of them."""
        address = tensor.untyped_storage().data_ptr()
        arena = self._at.get(address)
        return arena is not None and arena.tensor.untyped_storage().data_ptr() == address  # it may be given up

    def when_gone(self, user: object, action: Callable[[], object]) -> None:
        """Once no rank has its ``user`` any more, call ``action`` on all ranks at the same time."""
        if self._shared:
            weakref.finalize(user, self._unused.__setitem__, self._count, action)
            self._count += 1
        else:
            weakref.finalize(user, action)

    def watch(self, module: torch.nn.Module, give_up: Callable[[], object]) -> None:
        """Look for garbage once ``module``, which uses arenas, is gone; once no rank has it, ``give_up`` its units.

        Only where ranks give back together: what one rank gives up in its own time, others would still count with.
        """
        if self._shared:
            weakref.finalize(module, self.look_for_garbage)
            self.when_gone(module, give_up)

    def look_for_garbage(self) -> None:
        """When ``collect`` is called next: shards were left behind, and they hold each other."""
        self._lost = True

    def collect(self) -> None:
        """Give back what no rank uses any more.  Collective."""
        if not self._shared or not self._count:
            return
        while True:  # the end of one may be the end of others
            if self._lost:  # not always, as it takes a tenth of a second
                self._lost = False
                gc.collect()
            unused = torch.zeros(self._count, dtype=torch.uint8, device="cpu")
            unused[list(self._unused)] = 1
            self._ctx.control.all_reduce(unused, "min")
            numbers = unused.nonzero().flatten().tolist()
            for number in numbers:
                self._unused.pop(number)()
            if not numbers:
                return
