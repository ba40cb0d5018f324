"""The fp32 values that optimizers update: where values may be split, what bf16 parameters show and a remainder."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from .. import split_float
from .flat import FlatShard
from .place import Part
from .sharded_tensor import ShardedTensor


def can_split(flat: FlatShard) -> bool:
    """Whether values may have a remainder: every write to them comes through ``FlatShard``."""
    return flat.dtype == torch.bfloat16 and flat.unit.ctx.world_size > 1


def remainder_of(flat: FlatShard) -> torch.Tensor:
    """(S,) int16: what the shard leaves out, zeros at first.  All optimizers share it."""
    assert can_split(flat)
    if flat.remainder is None:
        flat.remainder = torch.zeros_like(flat.shard, dtype=torch.int16)
    return flat.remainder


def join(flat: FlatShard) -> torch.Tensor:
    """(S,) fp32, a copy."""
    return split_float.join(flat.shard, remainder_of(flat))


class JoinedValues:
    """The fp32 values of one parameter, made when they are read; a ``place.Home``."""

    is_gradient: ClassVar[bool] = False
    dtype = torch.float32

    def __init__(self, flat: FlatShard, index: int) -> None:
        self._flat, self._index, self.place = flat, index, flat.place_of(index)
        self.device = flat.shard.device

    def read(self) -> torch.Tensor:
        """(n,) this rank's part."""
        flat, index = self._flat, self._index
        return split_float.join(flat.local(flat.shard, index), flat.local(remainder_of(flat), index))

    def writing(self) -> AbstractContextManager[torch.Tensor]:
        """Nothing writes to a copy."""
        raise NotImplementedError


def part_of_joined(flat: FlatShard, index: int) -> ShardedTensor:
    """The fp32 values of one parameter where they are split, made when they are read."""
    flat.keep_writes()
    return ShardedTensor(Part(flat.place_of(index), home=JoinedValues(flat, index)))


def write_master(
    flat: FlatShard, values: torch.Tensor, index: int | None = None, changed: Iterable[int] | None = None
) -> None:
    """Replace this rank's part, of parameter ``index`` or of all, by fp32 ``values``.

    Of all, those that have changed are ``changed``, if that is known.

    What rounding them leaves out is kept where there is a remainder.
    """
    values = values.to(flat.shard.device)
    (flat.shard if index is None else flat.local(flat.shard, index)).copy_(values)
    if flat.remainder is not None:
        rest = flat.remainder if index is None else flat.local(flat.remainder, index)
        rest.copy_(split_float.split(values)[1])
    flat.changed(changed if index is None else [index])


def drop_remainder(flat: FlatShard, index: int) -> None:
    """Let the fp32 values of parameter ``index`` be just what it shows."""
    if flat.remainder is not None:
        flat.local(flat.remainder, index).zero_()
