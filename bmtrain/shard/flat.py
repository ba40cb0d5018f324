"""This rank's part of some parameters, laid flat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_not
from typing import Any, Protocol

import torch
from torch._guards import TracingContext

from ..autograd import backward_id
from ..context import Context
from ..device import Event
from ..errors import ConfigurationError, InPlaceError, ShardedAccessError
from ..log import warn
from ..precision import Precision
from .arenas import Arena
from .gradient import ShardGradient
from .landing import Landing
from .layout import Layout
from .parameter import (
    DistributedParameter,
    all_enter_sharded,
    all_enter_whole,
    any_trains,
    like,
    make_poison,
    raw_data,
    raw_grad,
    raw_grads,
    set_raw_grad,
)  # fmt: skip
from .place import Place
from .pools import Buffer, Pools, views_of
from .sharded_tensor import ShardedTensor, part_of
from .slices import joined, own_slice, whole_shape
from .writes import Writes


class Unit(Protocol):
    """What a flat shard asks of the unit that it is part of."""

    ctx: Context
    pools: Pools
    precision: Precision
    reduced: Event
    is_block: bool
    is_settled: bool
    is_stale: bool
    is_written: bool

    @property
    def moves(self) -> bool:
        """Whether whole parameters are made by a gather; else the one rank's shards are shown as they are."""

    def release_prefetched(self) -> None:
        """Give up values that were gathered ahead of their use."""

    def copy_into(self, memo: dict[int, object]) -> Unit:
        """A copy with its own shards; ``memo`` maps the old parameters to the new."""


class FlatShard:
    """Parameters of one dtype in one flat buffer, of which each rank keeps an equal shard.

    Attributes:
        key: a number by which to find what is kept for this flat shard.
        params, names: the parameters in the order of ``layout.slots``.
        gradient: this rank's reduced gradient.
        landing: where whole gradients wait to be reduced.
        splits: of slices, how their wholes are cut; None for all where they are none.
        is_counted: whether this rank's part counts, where tensor-parallel ranks keep the same.
        autocasts: whether the parameters belong to layers that autocast casts, so that they may be gathered cast.
        wire: dtype of the last gather, and so of computation.
        is_stepped_on: whether the parameters show what an optimizer is stepping on.
        version: grows when values change, so that optimizers' masters of them can follow.
        remainder: (S,) int16, what bf16 values leave out of optimizers' fp32 values (``fp32_values``); None if nothing.
    """

    def __init__(
        self, unit: Unit, params: Sequence[DistributedParameter], names: Sequence[str], autocasts: bool
    ) -> None:
        self.unit = unit
        self.params, self.names = list(params), list(names)
        self.dtype = self.wire = params[0].dtype
        self.layout: Layout = unit.pools.layout_of(tuple(tuple(p.shape) for p in params))
        self.splits = [p._split for p in params]
        self.is_counted = self.is_slice or unit.ctx.tensor_group.rank == 0
        self.autocasts = autocasts
        self.version = 0
        self._begin()
        for index, parameter in enumerate(self.params):
            if parameter._flat is not None:
                raise ConfigurationError(f"Parameter {names[index]!r} is sharded already.")
            self.local(self.shard, index).copy_(self.local_part(parameter.detach(), index))
        for index, parameter in enumerate(self.params):
            parameter._flat, parameter._index = self, index
            set_raw_grad(parameter, None)
        self.enter_sharded()

    def _begin(self) -> None:
        """Have memory for a shard, and nothing else yet."""
        self._arena = self._new_shard()
        self.gradient = self._new_gradient()
        alike = None if self.is_slice or self.unit.ctx.tensor_group.world_size == 1 else self.unit.ctx.tensor_group
        self.landing = Landing(self.layout, self.params, self.names, self._acquire_grads, alike)
        self.remainder: torch.Tensor | None = None
        self.buffer: Buffer | None = None
        self.key = self.unit.pools.new_key()  # not its id, which a later one may have
        self.is_stepped_on = False
        self._poison: list[torch.Tensor] = []
        self._places: dict[int, Place] = {}
        self._versions = [0] * len(self.params)  # how often each was changed when not all of them were
        self._of_all = 0  # how often all were
        self.steps, self._stepped_at = 0, [0] * len(self.params)  # by which of these each was changed last
        self._writes = Writes(self.params)

    def _new_gradient(self) -> ShardGradient:
        ctx, collectives = self.unit.ctx, self.unit.pools.collectives
        if self.is_slice:
            reduce, divisor = collectives.reduce, ctx.gradient_divisor
        else:
            reduce, divisor = collectives.reduce_unsliced, ctx.gradient_divisor * ctx.tensor_group.world_size
        return ShardGradient(self.unit.pools, self.layout, self.dtype, self.unit.reduced, reduce, divisor)

    def _new_shard(self) -> Arena:
        pools = self.unit.pools
        arena = pools.alloc_part(pools.collectives.gather, self.layout, self.dtype)
        arena.tensor.zero_()
        return arena

    def copy_for(self, unit: Unit, memo: dict[int, object]) -> FlatShard:
        """A second one with equal values and new parameters; ``memo`` maps old parameters to new."""
        made = FlatShard.__new__(FlatShard)
        made.__dict__.update(self.__dict__)
        made.unit, made.names, made.params = unit, list(self.names), []
        for index, old in enumerate(self.params):
            poison = make_poison((), self.dtype, self.shard.device)
            new = like(old, poison)
            new._flat, new._index = made, index
            memo[id(old)] = new
            made.params.append(new)
        made._begin()
        made.shard.copy_(self.shard)
        made.enter_sharded()
        return made

    def copy_unit(self, memo: dict[int, object]) -> None:
        """Copy the whole unit with all its parameters; ``memo`` maps the old ones to the new."""
        self.unit.copy_into(memo)

    def note_hooks(self, index: int) -> None:
        """Parameter ``index`` has got hooks on its gradient."""
        self.unit.ctx.engine.note_hooks(self.params[index])

    # -- states ---------------------------------------------------------------------------------------------------

    @property
    def shard(self) -> torch.Tensor:
        """(S,) this rank's values, in the parameters' dtype."""
        return self._arena.tensor

    @property
    def is_whole(self) -> bool:
        """Whether the parameters show their values."""
        return self.buffer is not None or self.is_stepped_on or not self.unit.moves

    @property
    def moves(self) -> bool:
        """Whether ranks have parts, of which the whole is gathered."""
        return self.unit.moves

    @property
    def in_block(self) -> bool:
        """Whether a Block gathers it."""
        return self.unit.is_block

    def enter_whole(self, buffer: Buffer) -> None:
        """Make the parameters views of ``buffer``, which holds all shards."""
        self.buffer = buffer
        all_enter_whole(self.params, buffer.views(self.layout))

    def enter_sharded(self) -> Buffer | None:
        """Show what needs no gather buffer: parts, or the shard itself where nothing moves.

        Returns the buffer that is not shown any more.
        """
        if self.buffer is not None:
            self.keep_writes()
        buffer, self.buffer = self.buffer, None
        if not self.unit.moves:
            all_enter_whole(self.params, views_of(self.shard, self.layout))
            return buffer
        if not self._poison:
            self._poison = [make_poison(slot.shape, self.dtype, self.shard.device) for slot in self.layout.slots]
        all_enter_sharded(self.params, self._poison)
        return buffer

    @property
    def casts(self) -> bool:
        """Whether these parameters may be gathered in another dtype than they rest in."""
        return self.autocasts or (self.unit.precision.param is not None and self.dtype.is_floating_point)

    def wire_for(self, compute: torch.dtype | None) -> torch.dtype:
        """The dtype to gather in; ``compute`` is as in ``ShardUnit.prefetch``."""
        return compute if compute is not None and self.casts else self.dtype

    def to_gather(self, compute: torch.dtype | None) -> tuple[torch.Tensor, Buffer | None]:
        """This rank's shard in the dtype to gather, and what to give back to the pool of casts behind the gather."""
        self.wire = self.wire_for(compute)
        if self.wire == self.dtype:
            return self.shard, None
        cast = self.unit.pools.acquire_cast(self, self.layout, self.wire)
        cast.tensor.copy_(self.shard)
        return cast.tensor, cast

    def whole_of(self, part: torch.Tensor) -> torch.Tensor:
        """(numel,) the whole flat buffer, of which each rank gives its ``part``.  Collective in the shard group."""
        ctx, layout = self.unit.ctx, self.layout
        size, padded = layout.shard_numel, part.contiguous()
        if part.numel() < size:  # of another stage of a pipeline
            padded = part.new_zeros(size)
        whole = torch.empty(layout.ranks * size, dtype=part.dtype, device=part.device)
        ctx.shard_group.all_gather(padded, whole)
        if len(layout.keepers) == layout.ranks:
            return whole
        return whole.view(layout.ranks, size)[layout.keepers.start :: layout.keepers.step].reshape(-1)

    def own_sum(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Into ``part``: this rank's part of the sum of all ranks' ``whole``.  Collective in the shard group."""
        group = self.unit.ctx.shard_group
        if len(self.layout.keepers) == self.layout.ranks:
            group.reduce_scatter(whole, part)
            return
        group.all_reduce(whole)
        start, end = self.layout.shard_range(self.unit.ctx.shard_rank)
        part.copy_(whole[start:end])

    # -- this rank's part -----------------------------------------------------------------------------------------

    def shape_of(self, index: int) -> tuple[int, ...]:
        """The whole shape of parameter ``index``."""
        return self.layout.slots[index].shape

    @property
    def is_slice(self) -> bool:
        """Whether these are slices, of which tensor-parallel ranks hold others."""
        return self.splits[0] is not None

    @property
    def slices(self) -> list[str]:
        """The names of those that are."""
        return self.names if self.is_slice else []

    def whole_shape(self, index: int) -> tuple[int, ...]:
        """The shape of parameter ``index`` without tensor parallelism."""
        return whole_shape(self.unit.ctx, self.shape_of(index), self.splits[index])

    def joined(self, index: int, own: torch.Tensor) -> torch.Tensor:
        """The same of a tensor like parameter ``index``.  Collective in the tensor-parallel group, of slices."""
        return joined(self.unit.ctx, own, self.splits[index])

    def own_slice(self, index: int, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a tensor without tensor parallelism; any other tensor as it is."""
        if not self.is_slice or tuple(whole.shape) != self.whole_shape(index):
            return whole
        return own_slice(self.unit.ctx, whole, self.splits[index])

    def index_at(self, offset: int) -> int:
        """The parameter that begins at ``offset`` of a whole flat buffer."""
        return next(i for i, slot in enumerate(self.layout.slots) if slot.start == offset and slot.numel)

    def param_at(self, offset: int, shape: tuple[int, ...]) -> DistributedParameter | None:
        """The parameter of this shape that begins at ``offset``, if there is one."""
        for slot, parameter in zip(self.layout.slots, self.params, strict=True):
            if slot.start == offset and slot.shape == shape:
                return parameter
        return None

    def place_of(self, index: int) -> Place:
        """Where this rank's part of parameter ``index`` is among all parts."""
        place = self._places.get(index)
        if place is None:
            place = self._places[index] = Place(
                self.unit.ctx, self.layout, index, self.names[index], self.splits[index]
            )
        return place

    def local(self, shard_like: torch.Tensor, index: int) -> torch.Tensor:
        """The part of parameter ``index`` within a tensor laid out like ``shard``: 1-D, may be empty."""
        return shard_like[self.layout.local(index, self.unit.ctx.shard_rank).shard]

    def local_part(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        """The same part taken from a tensor of the parameter's whole shape, with or without tensor parallelism."""
        return part_of(self.own_slice(index, whole), self.place_of(index), f"part of {self.names[index]!r}")

    def write(self, index: int, whole: torch.Tensor) -> None:
        """Take the values of parameter ``index`` from ``whole``: this rank's part, or all of them while it is whole."""
        if self.is_whole:
            raw_data(self.params[index]).copy_(whole)
            self.expose()
        else:
            with torch.no_grad():
                values = part_of(whole, self.place_of(index), f"assignment to {self.names[index]!r}")
                with self.writing(index) as part:
                    part.copy_(values)

    def write_part(self, index: int, part: torch.Tensor) -> None:
        """Take this rank's part of parameter ``index``, which is not gathered.  What lies there may be shown."""
        assert self.buffer is None
        self.local(self.shard, index).copy_(part)
        if self.remainder is not None:
            self.local(self.remainder, index).zero_()
        self.changed([index])

    def read_part(self, index: int) -> torch.Tensor:
        """(n,) this rank's part of parameter ``index``, not to be written."""
        if self.buffer is not None:
            self.keep_writes()
        return self.local(self.shard, index)

    @contextmanager
    def writing(self, index: int) -> Iterator[torch.Tensor]:
        """(n,) this rank's part of parameter ``index``, which the body changes in place, on all ranks alike."""
        if self.is_whole:
            raise ShardedAccessError(
                f"Parameter {self.names[index]!r} is whole now: a forward runs, or this is inside `with "
                "bmt.gathered(...)`. Write to the parameter's .data of now, not to what it gave while it was sharded."
            )
        part = self.local(self.shard, index)
        before = None if self.remainder is None else part.clone()
        yield part
        if self.remainder is not None and before is not None:
            self.local(self.remainder, index).masked_fill_(part != before, 0)
        self.changed([index])

    def version_of(self, index: int) -> int:
        """Grows when values of parameter ``index`` may have changed."""
        return self._of_all + self._versions[index]

    def step_on(self, indices: Iterable[int] | None = None) -> None:
        """Parameters ``indices``, or all, are changed in place as torch counts it: by a step, not through .data."""
        self.steps += 1
        for index in range(len(self.params)) if indices is None else indices:
            self._stepped_at[index] = self.steps

    def require_unchanged(self, indices: Iterable[int], since: int, more: str = "") -> None:
        """Raises InPlaceError if one of ``indices`` was changed in place after ``steps`` was ``since``."""
        for index in indices:
            if self._stepped_at[index] > since:
                raise InPlaceError(
                    f"Parameter {self.names[index]!r}, which a backward needs as it was in the forward, was changed in "
                    "place since, as by an optimizer's step or load_state_dict. Call backward before, or run the "
                    f"forward again after it{more or ': torch says so, too, on one process'}."
                )

    def count_change(self, indices: Iterable[int] | None = None) -> None:
        """Values of parameters ``indices`` changed, or of all; what was gathered of the old ones is no concern here."""
        self.version += 1
        if indices is None:
            self._of_all += 1
        else:
            for index in indices:
                self._versions[index] += 1

    def changed(self, indices: Iterable[int] | None = None, *, prefetched_too: bool = True) -> None:
        """Values of ``indices``, or all, changed; unless told otherwise, a gather of old ones under way is given up."""
        self.count_change(indices)
        if prefetched_too:
            self.unit.release_prefetched()
        else:
            self.unit.is_stale = True

    # -- writes into whole parameters -----------------------------------------------------------------------------

    def show_at_rest(self) -> None:
        """In a forward that has gathered it cast, show the values as they rest, if that can be done now.

        Autocast casts weights for the layers that use them; to all other code they are what they are.
        """
        if self.is_cast and self.autocasts and backward_id() is None:
            self.unit.ctx.engine.show_at_rest(self.params[0])

    @property
    def is_cast(self) -> bool:
        """Whether the parameters show their values in another dtype than they rest in."""
        return self.buffer is not None and self.buffer.tensor.dtype != self.dtype

    def expose(self, shown: torch.Tensor | None = None) -> None:
        """User code holds ``shown``, ``p.data`` of a whole parameter, and may write to it unseen."""
        self._writes.expose(shown if self.is_cast else None)

    @property
    def may_be_written(self) -> bool:
        """Whether user code may have written into whole parameters what is not kept yet."""
        return self.is_whole and self._writes.happened

    def was_written(self, index: int, known: torch.Tensor) -> bool:
        """Whether parameter ``index``, which is whole, has other values than ``known``."""
        present = raw_data(self.params[index])
        with torch._C.DisableTorchFunctionSubclass():
            same = present.dtype == known.dtype and present.shape == known.shape
            return same and not torch.equal(present.to(known.device), known)

    def keep_writes(self) -> None:
        """Keep what user code wrote into whole parameters in place, as in an unsharded model."""
        if self._writes.happened:
            if self.is_cast and (written := self._writes.seen()):
                self.unit.pools.outer.rounded += [self.names[index] for index in written]
            self.unit.is_written = True
            self.forget_writes()
            self.keep_whole_values()

    def forget_writes(self) -> None:
        """What was written until now is kept already, or unwanted."""
        self._writes.forget()

    def keep_whole_values(self) -> None:
        """Take this rank's part of what the gather buffer holds now."""
        if self.buffer is not None:
            start, end = self.layout.shard_range(self.unit.ctx.shard_rank)
            part = self.buffer.tensor[start:end]
            if part.dtype != self.shard.dtype:  # gathered in low precision: what was not written stays as precise
                part = torch.where(part != self.shard.to(part.dtype), part.to(self.shard.dtype), self.shard)
            if self.remainder is not None:
                self.remainder.masked_fill_(part != self.shard, 0)
            self.shard.copy_(part)
        self.changed(prefetched_too=False)

    def convert(self, shard: torch.Tensor) -> None:
        """Replace the shard by ``shard``, maybe of another dtype.  Gradients are dropped."""
        assert shard.shape == self.shard.shape
        self.dtype = self.wire = shard.dtype
        self.remainder = None
        self._arena = self._new_shard()
        self.shard.copy_(shard)
        self.gradient = self._new_gradient()
        self._poison = []
        self.changed()
        self.enter_sharded()

    # -- gradients ------------------------------------------------------------------------------------------------

    @property
    def trainable(self) -> bool:
        """Whether any parameter here gets a gradient."""
        return any_trains(self.params)

    @property
    def reduce_dtype(self) -> torch.dtype:
        """Dtype in which whole gradients are collected, sent and summed."""
        return self.unit.precision.reduce or self.wire

    @property
    def lands(self) -> bool:
        """Whether gradients may be computed straight into the buffer that is reduced."""
        return self.is_whole and self.reduce_dtype == self.wire

    def _acquire_grads(self) -> Buffer:
        if self.unit.ctx.world_size == 1:
            return self.gradient.room(self.reduce_dtype)
        return self.unit.pools.acquire_grads(self, self.layout, self.reduce_dtype)

    def add_raw_grad(self, index: int, whole: torch.Tensor) -> None:
        """Add to the gradient that autograd has accumulated for parameter ``index``."""
        present = raw_grad(self.params[index])
        set_raw_grad(self.params[index], whole if present is None else present + whole)

    def raw_grads(self) -> list[torch.Tensor | None]:
        """What autograd has accumulated and nobody reduced yet."""
        return raw_grads(self.params)

    @property
    def has_raw_grads(self) -> bool:
        """Whether any waits to be reduced."""
        found = self.landing.is_used or any(map(is_not, self.raw_grads(), repeat(None)))
        return found and self.trainable

    def collect(self) -> Buffer:
        """Whole gradients, brought into the buffer that is to be reduced."""
        return self.landing.collect(self.gradient.touched)

    def clear_grad(self) -> None:
        """Forget the gradient; its memory stays for the next one."""
        if self.unit.ctx.world_size == 1:
            self.landing.release()
        self.gradient.clear()
        self.landing.forget_all()
        for parameter, raw in zip(self.params, self.raw_grads(), strict=True):
            if raw is not None:
                set_raw_grad(parameter, None)

    def set_grad(self, index: int, whole: torch.Tensor | None) -> None:
        """Replace one parameter's gradient (whole shape, the same on all ranks; or a ShardedTensor) or drop it."""
        part = None if whole is None else part_of(whole, self.place_of(index), f"gradient of {self.names[index]!r}")
        self.gradient.set(index, part)
        if whole is None:
            self.landing.forget(index)
            if self.gradient.reached is not None:
                self.gradient.reached.discard(index)  # who drops a gradient knows that it does not train

    def visible_grad(self, index: int) -> torch.Tensor | None:
        """What ``parameter.grad`` shows for a reduced gradient."""
        gradient = self.gradient
        if not gradient.present:
            return None
        if self.unit.ctx.world_size == 1:
            return gradient.whole(index) if gradient.touched[index] else None
        if index in gradient.dropped:
            return None
        if TracingContext.try_get() is not None and not self.unit.ctx.engine.idle:
            return None  # the code of a module is being compiled, which asks its inputs for all that they have
        # Not `touched`, which ranks may differ in: what user code does next is done by all of them.
        if backward_id() is None and not gradient.is_used(index):
            return None
        return ShardedTensor(gradient.part(index, self.place_of(index)))

    def gather_grad(self, part: torch.Tensor) -> torch.Tensor:
        """(numel,) the whole flat gradient, of which each rank gives its ``part``.  Collective in the shard group."""
        self.unit.ctx.engine.comes_to(f"bmt.gather_grad of {self.names[0]!r} and what lies beside it")
        return self.whole_of(part)

    def warn_of_untrained(self, touched: Sequence[bool]) -> None:
        """At the first step: ``touched`` says of each parameter whether any rank has a gradient for it."""
        reached, self.gradient.reached = self.gradient.reached or set(), None
        with torch._C.DisableTorchFunctionSubclass():
            missing = [self.names[i] for i in sorted(reached) if not touched[i] and self.params[i].requires_grad]
        if missing:
            warn(
                f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} took "
                "part in the loss, but no rank got a gradient: they do not train. If an autograd function means to "
                "give them none, or compiled code uses them detached only, say so with requires_grad_(False).",
                stacklevel=2,
            )


def flat_of(parameter: object) -> FlatShard | None:
    """The flat shard that holds ``parameter``; None for whatever is no sharded parameter."""
    return getattr(parameter, "_flat", None)  # a Home, of which FlatShard is the only kind; asked often


def place_of(parameter: torch.Tensor) -> tuple[FlatShard, int]:
    """Where a parameter that is sharded lies."""
    sharded: Any = parameter
    assert sharded._flat is not None
    return sharded._flat, sharded._index
