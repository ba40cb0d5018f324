"""Where parameters lie in a flat buffer and which part of it each rank keeps.  Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import NamedTuple

ALIGN = 128
"""Every parameter starts at a multiple of this many elements, so that kernels may use 128-bit loads on any dtype."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the flat buffer, in elements."""

    start: int
    shape: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    @cached_property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.numel


class Local(NamedTuple):
    """The part of one parameter that lies on one rank: where in the shard, and where in the flattened parameter."""

    shard: slice
    whole: slice


@dataclass(frozen=True)
class Layout:
    """A flat buffer of ``numel`` elements, cut into equal parts, one for each of the ``keepers``.

    These are among the ``ranks`` of the shard group: all of them, or those of one stage of a pipeline.
    """

    slots: tuple[Slot, ...]
    keepers: range
    ranks: int
    numel: int

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges between parameters and behind the last, which none of them fills."""
        ends = [*(slot.start for slot in self.slots[1:]), self.numel]
        return tuple((slot.end, end) for slot, end in zip(self.slots, ends, strict=True) if slot.end < end)

    @property
    def shard_numel(self) -> int:
        """Elements that one keeper has."""
        return self.numel // len(self.keepers)

    def numel_on(self, rank: int) -> int:
        """Elements that ``rank``, of the shard group, has."""
        return self.shard_numel if rank in self.keepers else 0

    def shard_range(self, rank: int) -> tuple[int, int]:
        """Where the shard of ``rank``, of the shard group, starts and ends in the flat buffer."""
        if rank not in self.keepers:
            return 0, 0
        part = self.keepers.index(rank)
        return part * self.shard_numel, (part + 1) * self.shard_numel

    def local(self, index: int, rank: int) -> Local:
        """The part of parameter ``index`` on ``rank``; empty when no element of it lies there."""
        slot, (first, last) = self.slots[index], self.shard_range(rank)
        start, end = max(slot.start, first), min(slot.end, last)
        if start >= end:
            return Local(slice(0, 0), slice(0, 0))
        return Local(slice(start - first, end - first), slice(start - slot.start, end - slot.start))


@cache
def make_layout(
    shapes: tuple[tuple[int, ...], ...], ranks: int, keepers: range | None = None, align: int = ALIGN
) -> Layout:
    """Lay parameters of these shapes one after the other and pad so that all keepers, or all ranks, have equally much.

    Equal arguments give the same object, so that blocks of one shape share views of one buffer.
    """
    slots, offset = [], 0
    for shape in shapes:
        slots.append(Slot(offset, shape))
        offset += -(-prod(shape) // align) * align
    keepers = range(ranks) if keepers is None else keepers
    unit = len(keepers) * align
    return Layout(tuple(slots), keepers, ranks, -(-offset // unit) * unit)
