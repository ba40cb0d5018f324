"""Parameters that were frozen after they had been sharded, as scripts for adapters do it."""

from __future__ import annotations

import torch

from .flat import FlatShard
from .parameter import follow_taken
from .unit import ShardUnit


def keep_frozen_apart(unit: ShardUnit) -> None:
    """Before ``unit``'s first gradient: give frozen parameters flat shards of their own, which are never reduced.

    Collective.
    """
    unit.is_settled = True
    if not any(_is_mixed(flat) for flat in unit.flats):
        return
    unit.release()
    unit.gather()
    flats = []
    for flat in unit.flats:
        if not _is_mixed(flat):
            flats.append(flat)
            continue
        buffer = flat.buffer
        flats += _split(flat)
        if buffer is not None:
            unit.lender.params.give_back(buffer, unit.ctx.device.current_stream())
    unit.flats, unit.pools.regrouped = flats, True
    unit.release()


def _is_mixed(flat: FlatShard) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return len({p.requires_grad for p in flat.params}) > 1


def _split(flat: FlatShard) -> list[FlatShard]:
    """Two in place of ``flat``, which is whole: parameters that train, and frozen ones."""
    made = []
    for trains in (True, False):
        chosen = [index for index, p in enumerate(flat.params) if p.requires_grad == trains]
        for index in chosen:
            flat.params[index]._flat = None
        params, names = [flat.params[i] for i in chosen], [flat.names[i] for i in chosen]
        made.append(FlatShard(flat.unit, params, names, flat.autocasts))
        if not flat.unit.moves:
            for parameter in params:
                follow_taken(parameter)
    return made
