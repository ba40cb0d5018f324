"""Copies of flat shards, for ``copy.deepcopy`` of a sharded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .flat import FlatShard
from .gradient import ShardGradient
from .parameter import DistributedParameter, make_poison

if TYPE_CHECKING:
    from .unit import ShardUnit


def copy_flat(flat: FlatShard, unit: ShardUnit, memo: dict[int, Any]) -> FlatShard:
    """A second FlatShard with equal values and new parameters; ``memo`` maps old parameters to new."""
    made = FlatShard.__new__(FlatShard)
    made.__dict__.update(flat.__dict__)
    made.unit, made.names, made.remainder = unit, list(flat.names), None
    made.touched, made.gradient, made.reached = [False] * len(flat.params), ShardGradient(made), set()
    made._arena = made._new_shard()
    made.shard.copy_(flat.shard)
    made.buffer, made._landing, made._poison, made.params = None, None, [], []
    for index, old in enumerate(flat.params):
        new = DistributedParameter(
            make_poison((), flat.dtype, flat.shard.device), old.requires_grad, old._init_method, old._group
        )  # fmt: skip
        new._flat, new._index = made, index
        memo[id(old)] = new
        made.params.append(new)
    made.forget_writes()
    made.rest()
    return made
