"""What each rank holds of a model's parameters, gradients and optimizer states, from their shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..block.assign_units import Group, plan_units
from ..block.block import Block
from ..block.record import record_of
from ..optim.adam_state import bytes_beside
from ..precision import Precision
from ..shard.layout import Layout, make_layout
from ..shard.unit import flat_groups
from .scaling import Unit, Work


@dataclass(frozen=True)
class Flat:
    """One flat buffer to be: as ``shard.flat.FlatShard``, before there is one."""

    layout: Layout
    dtype: torch.dtype
    wire: torch.dtype
    reduce: torch.dtype
    trains: bool
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Held:
    """Bytes on each rank from the second step on; ``whole`` and ``whole_gradients`` are buffers that units share."""

    parameters: int
    gradients: int
    states: int
    whole: int
    whole_gradients: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.states + self.whole + self.whole_gradients


def flats_of(model: nn.Module, precision: Precision, shards: int, autocast: torch.dtype | None) -> list[list[Flat]]:
    """By unit, the flat buffers that sharding ``model`` over ``shards`` ranks makes."""
    cast_to = autocast if shards > 1 else None  # one rank gathers nothing
    return [list(_flats(group, precision, shards, cast_to)) for group in plan_units(model)]


def _flats(group: Group, precision: Precision, shards: int, autocast: torch.dtype | None) -> Iterator[Flat]:
    record = record_of(group.owner)
    policy = (record.precision if record is not None else None) or precision
    for members, casts in flat_groups(group.parameters, group.autocasts):
        parameters = tuple(group.parameters[i] for i in members)
        first = parameters[0]
        wire = policy.param if policy.param is not None and first.dtype.is_floating_point else first.dtype
        if casts and policy.param is None and autocast is not None:
            wire = autocast
        layout = make_layout(tuple(tuple(p.shape) for p in parameters), shards)
        yield Flat(layout, first.dtype, wire, policy.reduce or wire, first.requires_grad, parameters)


def held(flats: Sequence[Flat], ranks: int, accumulates: bool) -> Held:
    """What ranks hold of these between two steps and, of buffers, during one.

    On one rank a whole gradient is where the backward has put it, so that none is counted here.
    """
    parameters = sum(flat.layout.shard_numel * flat.dtype.itemsize for flat in flats)
    trained = [flat for flat in flats if flat.trains]
    gradients = 0
    if ranks > 1:
        for flat in trained:
            wide = accumulates and flat.reduce in (torch.float16, torch.bfloat16)
            gradients += flat.layout.shard_numel * (flat.reduce.itemsize + 4 * wide)
    states = sum(flat.layout.shard_numel * bytes_beside(flat.dtype, ranks > 1) for flat in trained)
    gathered = [flat for flat in flats if ranks > 1 or flat.wire != flat.dtype]
    whole = _pooled([(flat.layout.numel, flat.wire, 0) for flat in gathered])
    whole += _pooled([(flat.layout.shard_numel, flat.wire, 0) for flat in gathered if flat.wire != flat.dtype])
    reduced = [(flat.layout.numel, flat.reduce, id(flat.layout)) for flat in trained if ranks > 1]
    return Held(parameters, gradients, states, whole, _pooled(reduced))


def work_of(
    model: nn.Module, precision: Precision, shards: int, autocast: torch.dtype | None, accumulates: bool
) -> Work:
    """What a step moves of ``model``, sharded over ``shards`` ranks."""
    blocks, rest, updated = [], Unit(0, 0), 0
    groups = plan_units(model)
    for group, flats in zip(groups, flats_of(model, precision, shards, autocast), strict=True):
        trained = [flat for flat in flats if flat.trains]
        unit = Unit(
            sum(flat.layout.numel * flat.wire.itemsize for flat in flats),
            sum(flat.layout.numel * flat.reduce.itemsize for flat in trained),
        )
        if isinstance(group.owner, Block) and unit.gathered:
            blocks.append(unit)
        else:
            rest = Unit(rest.gathered + unit.gathered, rest.reduced + unit.reduced)
        for flat in trained:
            beside = bytes_beside(flat.dtype, shards > 1)
            gradient = 4 if accumulates else flat.reduce.itemsize
            updated += flat.layout.numel * (2 * (flat.dtype.itemsize + beside) + gradient)
    return Work(tuple(blocks), rest, updated)


def _pooled(wanted: Sequence[tuple[int, torch.dtype, int]]) -> int:
    """Bytes of the buffers that serve them: two for any number of the same kind (``shard.pools.BufferPool``)."""
    return sum(numel * dtype.itemsize * min(2, users) for (numel, dtype, _), users in Counter(wanted).items())
