"""Parameters that a forward changes, on every rank as its own share of the batch says.

Of such a change every rank keeps its part.  Ranks that keep the same part would keep different values, and each copy of
the parameters would go its own way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..shard.unit import ShardUnit
from .schedule import Schedule


class Replicas:
    """Makes the copies equal again in every optimizer step: all take the first one's values of what was written.

    Whether anything was is asked beside the step, so that nobody waits for the answer.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._asked: tuple[Callable[[], None], torch.Tensor, list[ShardUnit | None]] | None = None

    def ask(self) -> None:
        """A step begins: which units has any rank written to?  Collective."""
        if self._asked is not None:
            return
        units = [self._schedule.units.get(index) for index in range(self._schedule.registered)]
        # A unit that one rank has collected already nobody needs any more.
        facts = [[unit is not None and unit.is_written for unit in units], [unit is None for unit in units]]
        for unit in units:
            if unit is not None:
                unit.is_written = False
        flags = torch.tensor(facts, dtype=torch.uint8, device="cpu")
        self._asked = self._schedule.ctx.control.start_all_reduce(flags, "max"), flags, units

    def level(self) -> None:
        """The step is over: make equal what was written.  Collective."""
        if self._asked is None:
            return
        (wait, flags, units), self._asked = self._asked, None
        wait()
        for unit, written, gone in zip(units, *flags.tolist(), strict=True):
            if not written or gone or unit is None:
                continue
            if unit.is_whole:  # by `bmt.gathered`, for as long as that lasts
                unit.is_written = True
                continue
            for flat in unit.flats:
                for values in (flat.shard, flat.remainder):
                    if values is not None and values.numel():
                        unit.ctx.replicate_group.broadcast(values, 0)
                flat.changed()
            self._schedule.updated([unit])
