"""Ranges of a flattened tensor as boxes of the whole one, which is how torch.distributed.checkpoint names parts.

Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """Elements that are neighbours in the whole tensor and in memory; ``start`` is the first in the flattened one."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + prod(self.sizes)


class Region(NamedTuple):
    """Part of a whole tensor.  Its elements are counted by themselves.

    Attributes:
        shape: of the part.
        whole: of the whole.
        dim: along which it is a part.
        runs: along ``dim``, in order: how many indices are neighbours in the whole, and the first of them there.  More
            than one along the first dimension only.
    """

    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dim: int = 0
    runs: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, shape: Sequence[int]) -> Region:
        """All of a tensor."""
        return cls(tuple(shape), tuple(shape))

    def boxes(self, start: int, end: int, most: int) -> Iterator[Box]:
        """As ``boxes`` below, of this part, with the offsets that they have in the whole tensor."""
        if not self.runs:
            yield from boxes(self.shape, start, end, most)
            return
        before = 0  # elements of this part
        for count, first in self.runs:
            shape = (*self.shape[: self.dim], count, *self.shape[self.dim + 1 :])
            numel = prod(shape)
            for box in boxes(shape, max(start - before, 0), min(end - before, numel), most):
                offsets = tuple(at + first if dim == self.dim else at for dim, at in enumerate(box.offsets))
                yield Box(offsets, box.sizes, box.start + before)
            before += numel


def boxes(shape: Sequence[int], start: int, end: int, most: int) -> Iterator[Box]:
    """The range from ``start`` to ``end`` of a tensor of this shape, row by row, as few boxes in order.

    Of k dimensions there are at most 2k - 1 of them, unless they are cut so that none has more than ``most`` elements.
    """
    yield from _cut(tuple(shape), (), 0, start, end, most)


def _cut(shape: tuple[int, ...], outer: tuple[int, ...], at: int, start: int, end: int, most: int) -> Iterator[Box]:
    """Of the part that begins at element ``at`` and has the indices ``outer``, what lies in the range."""
    if start >= end:
        return
    if not shape:
        yield Box(outer, (1,) * len(outer), at)
        return
    row = prod(shape[1:])
    first, last = (start - at) // row, (end - at) // row  # the rows that both ends lie in
    if start > at + first * row:  # a row that begins before the range
        stop = min(end, at + (first + 1) * row)
        yield from _cut(shape[1:], (*outer, first), at + first * row, start, stop, most)
        first += 1
    if row > most:
        for index in range(first, last):
            begin = at + index * row
            yield from _cut(shape[1:], (*outer, index), begin, begin, begin + row, most)
    else:
        step = max(1, most // row)
        for index in range(first, last, step):
            count = min(step, last - index)
            sizes = (1,) * len(outer) + (count, *shape[1:])
            yield Box((*outer, index) + (0,) * (len(shape) - 1), sizes, at + index * row)
    if last >= first and end > at + last * row:  # a row that ends behind it
        yield from _cut(shape[1:], (*outer, last), at + last * row, max(start, at + last * row), end, most)
