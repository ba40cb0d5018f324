"""Parameters that become whole together: a block's, or what is left to the root."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..context import Context
from .flat import FlatShard
from .parameter import DistributedParameter
from .pool import Buffer, BufferPool

if TYPE_CHECKING:
    from ..device import Event


class Pools:
    """Where units get their buffers: whole parameters, whole gradients, and parts of reduced gradients."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.params = BufferPool(ctx.device, ctx.gather, zeroed=False)
        self.grads = BufferPool(ctx.device, ctx.reduce, zeroed=True)
        self.parts = BufferPool(ctx.device, ctx.reduce, zeroed=False)

    def join(self, flat: FlatShard) -> None:
        """``flat`` will use buffers, until it is gone."""
        keys = ((self.params, _size(flat)), (self.grads, _place(flat)), (self.parts, _size(flat)))
        for pool, key in keys:
            pool.join(key)
            weakref.finalize(flat, pool.leave, key)

    def acquire_params(self, flat: FlatShard) -> Buffer:
        """For all values of ``flat``, to be written on the gather stream."""
        return self.params.acquire(flat.layout.numel, flat.dtype, _size(flat), self._ctx.device.gather_stream)

    def acquire_grads(self, flat: FlatShard) -> Buffer:
        """For all gradients of ``flat``, to be written by the current stream; zeros between parameters."""
        stream = self._ctx.device.current_stream()
        return self.grads.acquire(flat.layout.numel, flat.dtype, _place(flat), stream)

    def acquire_part(self, flat: FlatShard) -> Buffer:
        """For this rank's part of one reduction, to be written on the reduce stream."""
        return self.parts.acquire(flat.layout.shard_numel, flat.dtype, _size(flat), self._ctx.device.reduce_stream)


def _size(flat: FlatShard) -> tuple[int, torch.dtype]:
    return flat.layout.numel, flat.dtype


def _place(flat: FlatShard) -> tuple[int, torch.dtype]:
    return id(flat.layout), flat.dtype  # equal layouts are one object, and have their gaps at the same places


class ShardUnit:
    """The shards of one group of parameters and the moves between sharded and whole.

    This is the mechanism; when to move is decided above (``bmtrain.block``).  ``start_gather`` and ``reduce_grads`` are
    collective: all ranks call them in the same order.

    Attributes:
        pins: how many running forwards need it whole.
        open_uses: forwards whose backward has not passed yet.
        keep: stay whole from the first forward to the end of the backward (ZeRO-2).
    """

    def __init__(
        self, ctx: Context, pools: Pools, name: str, params: Sequence[DistributedParameter], names: Sequence[str]
    ) -> None:
        self.ctx, self.pools, self.name = ctx, pools, name
        self.index = -1  # its place in the engine's order, given on first use
        self.pins = 0
        self.open_uses = 0
        self.keep = False
        self.is_whole = ctx.world_size == 1
        self.reduced: Event = ctx.device.event()
        self._ready: Event = ctx.device.event()
        self._coming: list[Buffer] = []
        # One flat buffer for each dtype, frozen parameters apart so that they are never reduced; matrices first, so
        # that the usual weight-decay groups are contiguous.
        groups: dict[tuple[torch.dtype, bool], list[int]] = {}
        for index in sorted(range(len(params)), key=lambda i: params[i].dim() < 2):
            groups.setdefault((params[index].dtype, params[index].requires_grad), []).append(index)
        self.flats = [FlatShard(self, [params[i] for i in g], [names[i] for i in g]) for g in groups.values()]
        for flat in self.flats:
            pools.join(flat)

    @property
    def whole_bytes(self) -> int:
        """Bytes of all its parameters, padding included."""
        return sum(flat.layout.numel * flat.shard.element_size() for flat in self.flats)

    @property
    def is_coming(self) -> bool:
        """Whether a gather has been started and not yet shown."""
        return bool(self._coming)

    def start_gather(self) -> None:
        """Queue the gather of every parameter; compute may go on meanwhile."""
        if self.is_whole or self._coming:
            return
        device = self.ctx.device
        stream = device.gather_stream
        self._ready.record(device.current_stream())  # the shard may just have been updated
        self._ready.wait(stream)
        for flat in self.flats:
            buffer = self.pools.acquire_params(flat)
            with device.on(stream):
                self.ctx.gather.all_gather(flat.shard, buffer.tensor)
            self._coming.append(buffer)
        self._ready.record(stream)

    def finish_gather(self) -> None:
        """Show whole parameters to code that runs from now on."""
        if self.is_whole:
            return
        self.start_gather()
        self._ready.wait(self.ctx.device.current_stream())
        for flat, buffer in zip(self.flats, self._coming, strict=True):
            flat.show(buffer)
        self._coming, self.is_whole = [], True

    def release(self) -> None:
        """Give the whole values' memory back; the parameters are sharded again."""
        if self.ctx.world_size == 1:
            return
        self.discard()
        if not self.is_whole:
            return
        stream = self.ctx.device.current_stream()
        for flat in self.flats:
            buffer = flat.buffer
            flat.rest()
            if buffer is not None:
                self.pools.params.give_back(buffer, stream)
        self.is_whole = False

    def hide(self) -> None:
        """Show sharded parameters but keep the whole values, as if they had just come."""
        if self.is_whole and self.ctx.world_size > 1:
            for flat in self.flats:
                assert flat.buffer is not None
                self._coming.append(flat.buffer)
                flat.rest()
            self.is_whole = False

    def discard(self) -> None:
        """Drop a gather that was started and not shown: its values are out of date, or nobody needs them."""
        coming, self._coming = self._coming, []
        if coming:
            self._ready.wait(self.ctx.device.current_stream())
        for buffer in coming:  # both the gather and whoever used it before it was hidden are through by then
            self.pools.params.give_back(buffer, self.ctx.device.current_stream())

    def has_raw_grads(self) -> bool:
        """Whether autograd left gradients here that are not reduced yet."""
        return any(f.has_landed or any(g is not None for g in f.raw_grads()) for f in self.flats if f.trainable)

    def reduce_grads(self) -> None:
        """Sum whole gradients over ranks and add this rank's part to its gradient shards."""
        from .reduce import reduce_flat

        for flat in self.flats:
            if flat.trainable:
                reduce_flat(flat)
        self.reduced.record(self.ctx.device.reduce_stream)

    def copy_into(self, memo: dict[int, Any]) -> ShardUnit:
        """A copy with its own shards; ``memo`` maps the old parameters to the new."""
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        made = ShardUnit.__new__(ShardUnit)
        made.__dict__.update(self.__dict__)
        memo[id(self)] = made
        made.index, made.pins, made.open_uses = -1, 0, 0
        made._coming, made.is_whole = [], self.ctx.world_size == 1
        made.reduced, made._ready = self.ctx.device.event(), self.ctx.device.event()
        made.flats = [flat.copy_for(made, memo) for flat in self.flats]
        for flat in made.flats:
            self.pools.join(flat)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardUnit:
        return self.copy_into(memo)
