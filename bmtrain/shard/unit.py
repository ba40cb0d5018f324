"""Parameters that become whole together: a block's, or what is left to the root."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..context import Context
from ..precision import Precision
from .arenas import Arenas
from .copying import copy_flat
from .flat import FlatShard
from .parameter import DistributedParameter
from .pool import Buffer, BufferPool

if TYPE_CHECKING:
    from ..device import Event


class Pools:
    """Where units get their buffers: whole parameters, whole gradients, and parts of reduced gradients.

    Attributes:
        moves: whether any unit is made whole by gathers.
        regrouped: whether parameters have changed their flat shards and left the old ones behind.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.moves = ctx.world_size > 1
        self.regrouped = False
        self.arenas = arenas = Arenas(ctx)
        self.params = BufferPool(ctx.device, ctx.gather, arenas, zeroed=False)
        self.grads = BufferPool(ctx.device, ctx.reduce, arenas, zeroed=True)
        self.parts = BufferPool(ctx.device, ctx.reduce, arenas, zeroed=False)
        self.casts = BufferPool(ctx.device, ctx.gather, arenas, zeroed=False)
        self._users: weakref.WeakKeyDictionary[FlatShard, set[Any]] = weakref.WeakKeyDictionary()

    def tidy(self) -> None:
        """Give back what regrouped parameters have left behind.  Collective if there is any."""
        if self.regrouped:
            self.regrouped = False
            self._ctx.device.synchronize()
            self.arenas.look_for_garbage()
            self.arenas.collect()

    def acquire_params(self, flat: FlatShard) -> Buffer:
        """For all values of ``flat``, to be written on the gather stream."""
        return self._acquire(self.params, flat, flat.layout.numel, flat.wire, self._ctx.device.gather_stream)

    def acquire_cast(self, flat: FlatShard) -> Buffer:
        """For this rank's values in the dtype of the gather, to be written on the gather stream."""
        return self._acquire(self.casts, flat, flat.layout.shard_numel, flat.wire, self._ctx.device.gather_stream)

    def acquire_grads(self, flat: FlatShard) -> Buffer:
        """For all gradients of ``flat``, to be written by the current stream; zeros between parameters."""
        stream = self._ctx.device.current_stream()
        return self._acquire(self.grads, flat, flat.layout.numel, flat.reduce_dtype, stream, id(flat.layout))

    def acquire_part(self, flat: FlatShard, dtype: torch.dtype) -> Buffer:
        """For this rank's part of one reduction, to be written on the reduce stream."""
        return self._acquire(self.parts, flat, flat.layout.shard_numel, dtype, self._ctx.device.reduce_stream)

    def _acquire(
        self, pool: BufferPool, flat: FlatShard, numel: int, dtype: torch.dtype, stream: Any, place: int = 0
    ) -> Buffer:
        # Gradients share buffers among equal layouts only (those are one object): their gaps are at the same places.
        key = (numel, dtype, place)
        joined = self._users.setdefault(flat, set())
        if (id(pool), key) not in joined:
            joined.add((id(pool), key))
            pool.join(key)
            weakref.finalize(flat, pool.leave, key)
        return pool.acquire(numel, dtype, key, stream)


class ShardUnit:
    """The shards of one group of parameters and the moves between sharded and whole.

    This is the mechanism; when to move is decided above (``bmtrain.block``).  ``start_gather`` and ``reduce_grads`` are
    collective: all ranks call them in the same order.

    Attributes:
        pins: how many running forwards need it whole.
        open_uses: forwards whose backward has not passed yet.
        compute: the dtype that the last gather was to compute in.
        borrows: units that hold parameters which this one's module shares with others.
        keep: stay whole from the first forward to the end of the backward (ZeRO-2).
        is_settled: which parameter lies in which flat shard does not change any more.
    """

    def __init__(
        self,
        ctx: Context,
        pools: Pools,
        name: str,
        params: Sequence[DistributedParameter],
        names: Sequence[str],
        autocasts: Sequence[bool],
        precision: Precision | None = None,
    ) -> None:
        self.ctx, self.pools, self.name = ctx, pools, name
        self.inherits_precision = precision is None
        self.precision = ctx.precision if precision is None else precision
        self.pools.moves |= self.moves
        self.index = -1  # its place in the engine's order, given on first use
        self.pins = 0
        self.open_uses = 0
        self.keep = self.is_settled = False
        self.borrows: list[ShardUnit] = []
        self.compute: torch.dtype | None = None
        self.is_whole = not self.moves
        self.reduced: Event = ctx.device.event()
        self._ready: Event = ctx.device.event()
        self._coming: list[Buffer] = []
        # One flat buffer for each dtype, frozen parameters apart so that they are never reduced, and those apart that
        # autocast would cast; matrices first, so that the usual weight-decay groups are contiguous.
        groups: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
        for index in sorted(range(len(params)), key=lambda i: params[i].dim() < 2):
            casts = autocasts[index] and params[index].dtype == torch.float32
            groups.setdefault((params[index].dtype, params[index].requires_grad, casts), []).append(index)
        self.flats = [
            FlatShard(self, [params[i] for i in g], [names[i] for i in g], casts) for (_, _, casts), g in groups.items()
        ]

    @property
    def moves(self) -> bool:
        """Whether whole parameters are made by a gather; else the one rank's shards are shown as they are."""
        return self.ctx.world_size > 1 or self.precision.param is not None

    def change_precision(self, precision: Precision) -> None:
        """Follow another policy from the next gather on."""
        self.release()
        self.precision, self.inherits_precision = precision, False
        self.pools.moves |= self.moves
        self.is_whole = not self.moves
        for flat in self.flats:
            flat.rest()

    @property
    def is_coming(self) -> bool:
        """Whether a gather has been started and not yet shown."""
        return bool(self._coming)

    def compute_dtype(self, autocast: torch.dtype | None) -> torch.dtype | None:
        """What a forward under this autocast is to gather for."""
        return self.precision.param or autocast

    def fits(self, compute: torch.dtype | None) -> bool:
        """Whether what is whole or coming is what ``start_gather(compute)`` would bring."""
        return self.compute == compute or not any(flat.casts for flat in self.flats)

    def start_gather(self, compute: torch.dtype | None = None) -> None:
        """Queue the gather of every parameter; the device may go on computing meanwhile.

        Args:
            compute: gather in this dtype what the policy or autocast would cast to it; None gathers all as it rests.
        """
        if self.is_whole or self._coming:
            return
        self.compute = compute
        device = self.ctx.device
        stream = device.gather_stream
        self._ready.record(device.current_stream())  # the shard may just have been updated
        self._ready.wait(stream)
        for flat in self.flats:
            with device.on(stream):
                shard = flat.to_gather(compute)
                buffer = self.pools.acquire_params(flat)
                self.ctx.gather.all_gather(shard, buffer.tensor)
            self._coming.append(buffer)
        self._ready.record(stream)

    def finish_gather(self, compute: torch.dtype | None = None) -> None:
        """Show whole parameters to code that runs from now on."""
        if self.is_whole:
            return
        self.start_gather(compute)
        self._ready.wait(self.ctx.device.current_stream())
        for flat, buffer in zip(self.flats, self._coming, strict=True):
            flat.show(buffer)
        self._coming, self.is_whole = [], True

    def uses(self) -> int:
        """How many tensors are views of what is whole."""
        storages = [flat.buffer.tensor.untyped_storage() for flat in self.flats if flat.buffer is not None]
        return sum(torch._C._storage_Use_Count(storage._cdata) for storage in storages)

    def release(self) -> None:
        """Give the whole values' memory back; the parameters are sharded again."""
        if not self.moves:
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
        if self.is_whole and self.moves:
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
        made.borrows = [other.copy_into(memo) for other in self.borrows]
        made._coming, made.is_whole = [], not self.moves
        made.reduced, made._ready = self.ctx.device.event(), self.ctx.device.event()
        made.flats = [copy_flat(flat, made, memo) for flat in self.flats]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardUnit:
        return self.copy_into(memo)
