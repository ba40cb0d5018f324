"""Buffers for whole parameters and whole gradients, each with one owner at a time.

A buffer goes back with an event; the next owner's stream waits for it.  No buffer is ever handed to two owners, so no
two streams can race for it.  On a GPU buffers stay in the pool (allocation on the step path would cost time, and
the transport registers them once); on a CPU they go back to the allocator.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Hashable
from functools import partial

import torch
from torch.utils.dlpack import from_dlpack

from ..comm import Communicator
from ..context import Context
from ..device import Device
from .arenas import Arena, Arenas
from .layout import Layout, make_layout
from .whole_gradients import WholeGradients


def views_of(flat: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """Every parameter's view of a whole flat tensor."""
    return [flat[slot.start : slot.end].view(slot.shape) for slot in layout.slots]


class Buffer:
    """A flat tensor and the event after which its next owner may write it."""

    def __init__(self, arena: Arena, key: Hashable, device: Device) -> None:
        self.arena, self.key, self.free = arena, key, device.event()
        self._bytes = 0  # what to allocate again, where memory was given back
        # A CPU's transport holds what it moves for a while: where holders are counted, others are shown.
        counts = device.reuses_memory and not device.is_cuda
        self._lay_over(from_dlpack(arena.tensor) if counts else arena.tensor)

    def _lay_over(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._views: dict[int, list[torch.Tensor]] = {}
        self._holders = holders_of(tensor)  # beside the views

    def show_anew(self) -> None:
        """Other values come: who has views of the former ones is counted no more."""
        if self.is_viewed:
            with torch.inference_mode(False):
                self._lay_over(from_dlpack(self.arena.tensor))

    def spoil(self) -> None:
        """Overwrite every parameter's place, so that whoever still reads it is found out."""
        for views in self._views.values():
            for view in views:
                if view.is_floating_point():
                    view.fill_(float("nan"))

    @property
    def is_viewed(self) -> bool:
        """Whether others have views of what it holds, while no parameter shows it."""
        return holders_of(self.tensor) > self._holders + sum(len(views) for views in self._views.values())

    def give_up_memory(self) -> bool:
        """Free the memory and keep the views, for ``allocate``; False, and nothing, if views of others need it.

        So do those that are no tensors: torch leaves a storage as it is for good once numpy has seen it.
        """
        if self._bytes:
            return True
        storage = self.tensor.untyped_storage()
        if self.is_viewed or not storage.resizable():
            return False
        self._bytes = storage.nbytes()
        storage.resize_(0)
        return True

    def allocate(self) -> None:
        """Have memory again, uninitialised."""
        if self._bytes:
            self.tensor.untyped_storage().resize_(self._bytes)
            self._bytes = 0

    def views(self, layout: Layout) -> list[torch.Tensor]:
        """Every parameter's view of this buffer, made once for each layout."""
        views = self._views.get(id(layout))
        if views is None:
            with torch.inference_mode(False):  # the views outlive the caller's mode
                views = views_of(self.tensor, layout)
            self._views[id(layout)] = views
        return views


def holders_of(tensor: torch.Tensor) -> int:
    """How many tensors lie in the memory of ``tensor``, and one."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


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
        return Buffer(arena, key, self._device)

    def give_back(self, buffer: Buffer, stream: torch.cuda.Stream | None) -> None:
        """Return ``buffer``; work queued on ``stream`` so far may still use it."""
        if not self._device.reuses_memory or not self._users[buffer.key]:
            return
        self.lay_by(buffer, stream)
        self._idle.setdefault(buffer.key, deque()).append(buffer)

    def lay_by(self, buffer: Buffer, stream: torch.cuda.Stream | None) -> None:
        """Its owner keeps it for the next time; work queued on ``stream`` so far may still use it."""
        if self._device.schedule == "stress":
            with self._device.on(stream):
                buffer.spoil()
        buffer.free.record(stream)

    def trim(self) -> None:
        """Let go of idle buffers beyond the two that serve any number of units."""
        for key, idle in self._idle.items():
            while idle and self._made[key] > 2:
                idle.popleft()
                self._made[key] -= 1


class Pools:
    """Where units get their buffers: whole parameters, whole gradients, and parts of reduced gradients.

    The ``user`` of a buffer is an object that lives as long as buffers like it are wanted.

    Units of a stage of a pipeline have ``of_stage``'s, which move among the ranks of that stage only.

    Attributes:
        stage: of which stage of a pipeline they are; None: of none.
        collectives: what moves the buffers.
        moves: whether any unit is made whole by gathers.
        copies: units copied from others, which the schedule does not know yet.
        whole_gradients: what was gathered of gradients.
        changes: how often a buffer of whole parameters was taken, written anew or given back.
        rounded: names of parameters that code wrote to where they were whole in lower precision, and nobody has said.
        regrouped: whether parameters have changed their flat shards and left the old ones behind.
    """

    def __init__(self, ctx: Context, outer: Pools | None = None, stage: int | None = None) -> None:
        self.ctx, self.stage = ctx, stage
        self.outer: Pools = self if outer is None else outer
        self.collectives = ctx.collectives if stage is None else ctx.stage_collectives
        self._stages: dict[int, Pools] = {}
        self.moves = ctx.world_size > 1
        self.copies: list[weakref.ref[object]] = []
        self.rounded: list[str] = []
        self.regrouped = False
        self.whole_gradients = WholeGradients()
        self.changes = self._keys = 0
        self.arenas = arenas = Arenas(ctx, of_stage=stage is not None)
        gather, reduce = self.collectives.gather, self.collectives.reduce
        self.params = BufferPool(ctx.device, gather, arenas, zeroed=False)
        self.grads = BufferPool(ctx.device, reduce, arenas, zeroed=True)
        self.parts = BufferPool(ctx.device, reduce, arenas, zeroed=False)
        self.casts = BufferPool(ctx.device, gather, arenas, zeroed=False)
        self._users: weakref.WeakKeyDictionary[object, set[Hashable]] = weakref.WeakKeyDictionary()

    def of_stage(self, stage: int | None) -> Pools:
        """Those of a stage of a pipeline; these for None."""
        if stage is None:
            return self
        if stage not in self._stages:
            self._stages[stage] = Pools(self.ctx, self, stage)
        return self._stages[stage]

    def new_key(self) -> int:
        """A number that no other flat shard has had; below zero, as ids are not."""
        self.outer._keys -= 1
        return self.outer._keys

    @property
    def is_here(self) -> bool:
        """Whether this rank keeps any of what they serve."""
        return self.stage is None or self.stage == self.ctx.topology.pipe_rank

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in memory of theirs."""
        return self.arenas.holds(tensor) or any(pools.holds(tensor) for pools in self._stages.values())

    def layout_of(self, shapes: tuple[tuple[int, ...], ...]) -> Layout:
        """Where parameters of these shapes lie, and which ranks of the shard group keep them."""
        ranks = self.ctx.shard_group.world_size
        if self.stage is None:
            return make_layout(shapes, ranks)
        return make_layout(shapes, ranks, range(self.stage, ranks, self.ctx.topology.pipe_size))

    def alloc_part(self, comm: Communicator, layout: Layout, dtype: torch.dtype) -> Arena:
        """Memory for this rank's part, to be moved by ``comm``.  Collective."""
        return self.arenas.alloc(comm, layout.numel_on(self.ctx.shard_rank), dtype)

    def tidy(self) -> None:
        """Give back what regrouped parameters have left behind.  Collective if there is any."""
        if self.regrouped:
            self.regrouped = False
            self.ctx.device.synchronize()
            self.collect_garbage()

    def collect_garbage(self) -> None:
        """Let what no rank uses any more be gone on every rank.  Collective."""
        self.arenas.look_for_garbage()
        self.arenas.collect()

    def trim_params(self) -> None:
        """Give back what was made for units that are not whole any more.  Collective."""
        self.ctx.device.synchronize()
        self.params.trim()
        self.arenas.collect()
        self.ctx.device.empty_cache()

    def acquire_params(self, user: object, layout: Layout, dtype: torch.dtype) -> Buffer:
        """For all values, to be written on the gather stream."""
        return self._acquire(self.params, user, layout.numel, dtype, self.ctx.device.gather_stream)

    def acquire_cast(self, user: object, layout: Layout, dtype: torch.dtype) -> Buffer:
        """For this rank's values in the dtype of the gather, to be written on the gather stream."""
        return self._acquire(self.casts, user, layout.shard_numel, dtype, self.ctx.device.gather_stream)

    def acquire_grads(self, user: object, layout: Layout, dtype: torch.dtype) -> Buffer:
        """For all gradients, to be written by the current stream; zeros between parameters."""
        # Shared among equal layouts only (those are one object): their gaps are at the same places.
        return self._acquire(self.grads, user, layout.numel, dtype, self.ctx.device.current_stream(), id(layout))

    def make_grads(self, layout: Layout, dtype: torch.dtype) -> Buffer:
        """For all gradients on one rank, which keeps them there: of no pool, and uninitialised."""
        with torch.inference_mode(False):
            arena = self.arenas.alloc(self.collectives.reduce, layout.numel, dtype)
        return Buffer(arena, None, self.ctx.device)

    def acquire_part(self, user: object, layout: Layout, dtype: torch.dtype) -> Buffer:
        """For this rank's part of one reduction, to be written on the reduce stream."""
        return self._acquire(self.parts, user, layout.shard_numel, dtype, self.ctx.device.reduce_stream)

    def _acquire(
        self,
        pool: BufferPool,
        user: object,
        numel: int,
        dtype: torch.dtype,
        stream: torch.cuda.Stream | None,
        place: int = 0,
    ) -> Buffer:
        key = (numel, dtype, place)
        joined = self._users.setdefault(user, set())
        if (id(pool), key) not in joined:
            joined.add((id(pool), key))
            pool.join(key)
            self.arenas.when_gone(user, partial(pool.leave, key))  # together: it decides when memory is next taken
        return pool.acquire(numel, dtype, key, stream)
