"""Parameters that become whole together: a block's, or what is left to the root."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import is_not
from typing import NamedTuple

import torch
from torch import nn

from ..context import Context
from ..device import Event
from ..errors import UnsupportedError
from ..precision import Precision
from .flat import FlatShard
from .gradient import add_all
from .parameter import DistributedParameter, raw_grads, split_of
from .pools import Buffer, Pools


class State(enum.Enum):
    """Where the values of a unit's parameters are, and what memory that takes beside the shard.

    SHARDED: in the shards alone.  Parameters show this rank's parts.
    GATHERING: also in a buffer of the whole size, into which they are being gathered, or which was whole and is kept
        for a use to come.  Parameters show this rank's parts.
    WHOLE: also in a buffer of the whole size, of which the parameters are views.  Where nothing moves (one rank, no
        cast) there is no buffer: the parameters are views of the shard, always.
    """

    SHARDED = enum.auto()
    GATHERING = enum.auto()
    WHOLE = enum.auto()


class ShardUnit:
    """The shards of one group of parameters and the moves between SHARDED, GATHERING and WHOLE.

    This is the mechanism; when to move is decided above (``bmtrain.block``).  ``prefetch``, ``gather`` and
    ``reduce_grads`` are collective: all ranks call them in the same order.

    Attributes:
        pins: how many running forwards need it whole.
        open_uses: forwards whose backward has not passed yet.
        compute: the dtype that the last gather was to compute in.
        borrows: units that hold parameters which this one's module shares with others.
        keep: True: stay whole from the first forward to the end of the backward (ZeRO-2); False: do not; None: as
            memory allows.
        stays: the plan for memory lets it stay whole from one step to the next, in buffers of its own: what one rank
            has recorded reads them where they lie, and ranks that have not take and return memory in the same order.
        is_seen: somebody has views of what was whole, and will read them: it stays to the end of the backward.
        was_seen: that was so once, and not for a moment only.
        is_set_back: it is GATHERING because it was whole.
        trains_in: the dtype that the last backward was to compute in.
        is_block: whether it is a Block's.
        stage: that of a pipeline whose ranks alone keep it; None: all ranks of the shard group do.
        lender: whose buffers hold what is whole.
        is_stale: ranks may have written different values into what is whole.
        is_written: user code, such as a forward, may have changed whole values, on each rank otherwise.
        recorded: what is known of recording its block (``bmtrain.block.graphs.blocks``); None until that is looked at.
        is_settled: which parameter lies in which flat shard does not change any more.
        next_units: by what it was used in, the last two that were used next: what is predicted to follow is held, as
            every rank is to gather it ahead of its time or none, and each collects garbage in its own.
    """

    def __init__(
        self,
        pools: Pools,
        name: str,
        params: Sequence[DistributedParameter],
        names: Sequence[str],
        autocasts: Sequence[bool],
        precision: Precision | None = None,
    ) -> None:
        self.ctx: Context = pools.ctx
        self.pools, self.name, self.stage = pools, name, pools.stage
        self.inherits_precision = precision is None
        self.precision = self.ctx.precision if precision is None else precision
        self.pools.moves |= self.moves
        self.keep: bool | None = None
        self.is_block = self.is_settled = False
        self.borrows: list[ShardUnit] = []
        self.compute: torch.dtype | None = None
        self.trains_in: torch.dtype | None = None
        self._begin()
        self.flats = [
            FlatShard(self, [params[i] for i in group], [names[i] for i in group], casts)
            for group, casts in flat_groups(params, autocasts)
        ]

    def _begin(self) -> None:
        self.index = -1  # its place in the engine's order, given on first use
        self.pins = self.open_uses = 0
        self.stays = self.is_stale = self.is_written = self.is_set_back = False
        self.is_seen = self.was_seen = False
        self.is_whole = not self.moves
        self.reduced: Event = self.ctx.device.event()
        self._ready: Event = self.ctx.device.event()
        self._prefetched: list[Buffer] = []
        self._laid_by: dict[tuple[int, torch.dtype], Buffer] = {}  # by flat shard
        self.recorded: object | None = None
        self.next_units: dict[str, tuple[ShardUnit, ...]] = {}
        self.lender = self.pools

    @property
    def state(self) -> State:
        """Where the values are."""
        if self.is_whole:
            return State.WHOLE
        return State.GATHERING if self._prefetched else State.SHARDED

    @property
    def moves(self) -> bool:
        """Whether whole parameters are made by a gather; else the one rank's shards are shown as they are."""
        return self.ctx.world_size > 1 or self.precision.param is not None

    def change_precision(self, precision: Precision) -> None:
        """Follow another policy from the next gather on."""
        self.release()
        self._return_own_buffers()
        self.precision, self.inherits_precision = precision, False
        self.pools.moves |= self.moves
        self.is_whole = not self.moves
        for flat in self.flats:
            flat.enter_sharded()

    def never_cast(self) -> None:
        """From the next gather on, leave it to autocast to cast what layers compute with."""
        for flat in self.flats:
            flat.autocasts = False

    def compute_dtype(self, autocast: torch.dtype | None) -> torch.dtype | None:
        """What a forward under this autocast is to gather for."""
        return self.precision.param or autocast

    def fits(self, compute: torch.dtype | None) -> bool:
        """Whether what is whole or prefetched is what ``prefetch(compute)`` would bring."""
        return self.compute == compute or not any(flat.casts for flat in self.flats)

    @property
    def is_kept(self) -> bool:
        """Whether what is whole now is to stay from one step to the next."""
        return self.stays and not self.is_stale and self.fits(self.trains_in)

    @property
    def may_stay(self) -> bool:
        """Whether the plan for memory may let it stay."""
        return self.moves and self.keep is None

    @property
    def is_whole_apart(self) -> bool:
        """Whether it is whole, or on its way, on the ranks of its stage alone, while all ranks do the same again."""
        return self.lender is not self.pools.outer and not self.ctx.diary.is_apart and self.state is not State.SHARDED

    def whole_bytes(self, at_rest: bool = False) -> int:
        """Bytes of the whole values, in the dtypes of training or at rest."""
        return sum(
            flat.layout.numel * (flat.dtype if at_rest else flat.wire_for(self.trains_in)).itemsize
            for flat in self.flats
        )

    # -- moves ----------------------------------------------------------------------------------------------------

    def prefetch(self, compute: torch.dtype | None = None) -> None:
        """SHARDED to GATHERING: queue the gather of every parameter; the device may go on computing meanwhile.

        Args:
            compute: gather in this dtype what the policy or autocast would cast to it; None gathers all as it rests.
        """
        if self.state is State.SHARDED:
            prefetch_all([(self, compute)])

    def gather(self, compute: torch.dtype | None = None) -> None:
        """To WHOLE: parameters are views of the buffer for code that runs from now on."""
        if self.is_whole:
            return
        self.prefetch(compute)
        device = self.ctx.device
        with device.gather_waits.at():
            self._ready.wait(device.current_stream())
        for flat, buffer in zip(self.flats, self._prefetched, strict=True):
            flat.enter_whole(buffer)
        self._prefetched, self.is_whole, self.is_set_back = [], True, False

    def release(self) -> None:
        """To SHARDED: give the whole values' memory back."""
        if not self.moves:
            return
        self.release_prefetched()
        if not self.is_whole:
            return
        stream = self.ctx.device.current_stream()
        for flat in self.flats:
            buffer = flat.enter_sharded()
            if buffer is not None:
                self._give_back(flat, buffer, stream)
        self.pools.outer.changes += 1
        self.is_whole = self.is_seen = False

    @property
    def is_viewed(self) -> bool:
        """Whether somebody has views of what was whole, and others may get the memory."""
        return self.ctx.device.reuses_memory and not self.stays and any(buffer.is_viewed for buffer in self._prefetched)

    def _give_back(self, flat: FlatShard, buffer: Buffer, stream: torch.cuda.Stream | None) -> None:
        if self.stays:
            self.lender.params.lay_by(buffer, stream)
            self._laid_by[flat.key, buffer.tensor.dtype] = buffer
        else:
            self.lender.params.give_back(buffer, stream)

    def _acquire(self, lender: Pools, flat: FlatShard, wire: torch.dtype) -> Buffer:
        buffer = self._laid_by.pop((flat.key, wire), None)
        if buffer is None:
            return lender.acquire_params(flat, flat.layout, wire)
        buffer.free.wait(self.ctx.device.gather_stream)
        return buffer

    def stay_no_longer(self) -> None:
        """From here on it is whole only while it is used."""
        self.stays = False
        self._return_own_buffers()

    def _return_own_buffers(self) -> None:
        buffers, self._laid_by = self._laid_by, {}
        for buffer in buffers.values():
            self.lender.params.give_back(buffer, self.ctx.device.current_stream())

    def _receive(self, compute: torch.dtype | None) -> list[_Gather]:
        """Take buffers for a gather; those of the last one, if it is GATHERING and they fit."""
        self.compute, self.is_stale, self.is_set_back = compute, False, False
        # A stage of a pipeline gathers by itself while it runs.  Everywhere else all ranks take part.
        lender = self.pools if self.ctx.diary.is_apart else self.pools.outer
        wires = [flat.wire_for(compute) for flat in self.flats]
        if lender is not self.lender or [buffer.tensor.dtype for buffer in self._prefetched] != wires:
            self.release_prefetched()
        known, gathers, self.lender = self._prefetched, list[_Gather](), lender
        self._prefetched = []  # until the gathers are queued: who finds no memory for a buffer has nothing on its way
        self.pools.outer.changes += 1
        for index, flat in enumerate(self.flats):
            shard, cast = flat.to_gather(compute) if self.pools is lender else (None, None)
            flat.wire = wires[index]
            buffer = known[index] if known else self._acquire(lender, flat, flat.wire)
            if self.ctx.device.reuses_memory:
                buffer.show_anew()
            if shard is None:
                buffer.tensor.copy_(flat.whole_of(flat.shard.to(flat.wire)))
            gathers.append(_Gather(shard, cast, buffer))
        return gathers

    def _queued(self, gathers: list[_Gather]) -> None:
        """The gathers that were to be made are queued."""
        stream = self.ctx.device.gather_stream
        self._prefetched = [gather.buffer for gather in gathers]
        for gather in gathers:
            if gather.cast is not None:
                self.pools.casts.give_back(gather.cast, stream)
        self._ready.record(stream)

    def release_prefetched(self) -> None:
        """GATHERING to SHARDED: these values are out of date, or nobody needs them."""
        buffers, self._prefetched = self._prefetched, []
        self.is_seen = self.is_set_back = False
        if buffers:
            self.pools.outer.changes += 1
            self._ready.wait(self.ctx.device.current_stream())
        for flat, buffer in zip(self.flats, buffers, strict=True) if buffers else ():
            # Both the gather and whoever used it before it was set back are through by then.
            self._give_back(flat, buffer, self.ctx.device.current_stream())

    def set_back(self) -> None:
        """WHOLE to GATHERING: parameters are their parts again; the whole values stay, as if they had just come."""
        if self.is_whole and self.moves:
            for flat in self.flats:
                buffer = flat.enter_sharded()
                if buffer is None:
                    raise UnsupportedError(
                        "An optimizer stepped in the forward of a model that it trains, where parameters are whole. "
                        "Step after the forward has returned."
                    )
                self._prefetched.append(buffer)
            self.is_whole, self.is_set_back = False, True

    @property
    def kept_flats(self) -> dict[int, FlatShard] | None:
        """By the address of its memory, what each buffer holds; None unless the unit stays and is not SHARDED."""
        if not self.is_kept:
            return None
        buffers = self._prefetched or [flat.buffer for flat in self.flats if flat.buffer is not None]
        if not buffers:
            return None
        addresses = [buffer.tensor.untyped_storage().data_ptr() for buffer in buffers]
        return dict(zip(addresses, self.flats, strict=True))

    # -- gradients ------------------------------------------------------------------------------------------------

    def has_raw_grads(self) -> bool:
        """Whether autograd left gradients here that are not reduced yet."""
        return any(f.has_raw_grads for f in self.flats)

    def reduce_grads(self) -> None:
        """Sum whole gradients over ranks and add this rank's part to its gradient shards."""
        flats, device, diary = [flat for flat in self.flats if flat.trainable], self.ctx.device, self.ctx.diary
        if not flats:
            return
        diary.unit = self.name or "the root"
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():  # which asks of every parameter take time
            buffers = [flat.collect() for flat in flats]
            if self.ctx.world_size == 1:
                for flat, buffer in zip(flats, buffers, strict=True):
                    flat.gradient.add_written(buffer)
            else:
                self.reduced.record(device.current_stream())
                self.reduced.wait(device.reduce_stream)
                with device.on(device.reduce_stream):
                    add_all([flat.gradient for flat in flats], [buffer.tensor for buffer in buffers])
                for buffer in buffers:
                    self.pools.grads.give_back(buffer, device.reduce_stream)
                self.reduced.record(device.reduce_stream)
        diary.unit = ""

    def reduced_elsewhere(self) -> None:
        """The ranks that keep it have summed its gradients; here it has one, too, of no elements."""
        for flat in self.flats:
            if flat.trainable:
                flat.gradient.add_elsewhere()

    # -- copies ---------------------------------------------------------------------------------------------------

    def copy_into(self, memo: dict[int, object]) -> ShardUnit:
        """A copy with its own shards; ``memo`` maps the old parameters to the new."""
        known = memo.get(id(self))
        if isinstance(known, ShardUnit):
            return known
        made = ShardUnit.__new__(ShardUnit)
        made.__dict__.update(self.__dict__)
        memo[id(self)] = made
        made._begin()
        made.borrows = [other.copy_into(memo) for other in self.borrows]
        made.flats = [flat.copy_for(made, memo) for flat in self.flats]
        self.pools.copies.append(weakref.ref(made))
        return made

    def __deepcopy__(self, memo: dict[int, object]) -> ShardUnit:
        return self.copy_into(memo)


class _Gather(NamedTuple):
    """One gather: from where, a buffer to give back after it, and to where; None: what is to come is there already."""

    shard: torch.Tensor | None
    cast: Buffer | None
    buffer: Buffer


def prefetch_all(wanted: Sequence[tuple[ShardUnit, torch.dtype | None]]) -> None:
    """``ShardUnit.prefetch(dtype)`` for each, as one operation of the device; what is GATHERING is gathered anew."""
    wanted = [(unit, compute) for unit, compute in wanted if not unit.is_whole]
    if not wanted:
        return
    ctx, ready = wanted[0][0].ctx, wanted[0][0]._ready
    device, diary = ctx.device, ctx.diary
    ready.record(device.current_stream())  # shards may just have been updated, and buffers read
    ready.wait(device.gather_stream)
    with device.on(device.gather_stream):
        gathers = []
        for unit, compute in wanted:
            diary.unit = unit.name or "the root"
            gathers.append(unit._receive(compute))
        comm = wanted[0][0].lender.collectives.gather
        with comm.group():
            for (unit, _), of_unit in zip(wanted, gathers, strict=True):
                diary.unit = unit.name or "the root"
                for gather in of_unit:
                    if gather.shard is not None:
                        comm.all_gather(gather.shard, gather.buffer.arena.tensor)
    diary.unit = ""
    for (unit, _), of_unit in zip(wanted, gathers, strict=True):
        unit._queued(of_unit)


def wait_to_be_reduced(units: Iterable[ShardUnit]) -> bool:
    """Whether gradients in some of ``units`` may wait to be reduced; asked a few times a step."""
    flats = [flat for unit in units for flat in unit.flats]
    raw = raw_grads(chain.from_iterable(flat.params for flat in flats))
    return any(map(is_not, raw, repeat(None))) or any(flat.landing.is_used for flat in flats)


def flat_groups(params: Sequence[nn.Parameter], autocasts: Sequence[bool]) -> list[tuple[list[int], bool]]:
    """Which of a unit's parameters share a flat buffer, and whether autocast would cast those.

    One for each dtype, frozen parameters apart so that they are never reduced, and those apart that autocast would
    cast, and slices of tensor-parallel layers; matrices first, so that the usual weight-decay groups are contiguous.
    """
    groups: dict[tuple[torch.dtype, bool, bool, bool], list[int]] = {}
    for index in sorted(range(len(params)), key=lambda i: params[i].dim() < 2):
        casts = autocasts[index] and params[index].dtype == torch.float32
        key = params[index].dtype, params[index].requires_grad, casts, split_of(params[index]) is not None
        groups.setdefault(key, []).append(index)
    return [(group, casts) for (_, _, casts, _), group in groups.items()]


def unit_of_flat(flat: FlatShard) -> ShardUnit:
    """The unit that ``flat`` is part of."""
    assert isinstance(flat.unit, ShardUnit)
    return flat.unit
