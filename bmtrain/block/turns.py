"""Modules that are whole for a while of the running forward, though nobody calls them: they are in somebody's hand."""

from __future__ import annotations

from dataclasses import dataclass

from ..shard.unit import ShardUnit


@dataclass
class Turn:
    """A whole unit, for as long as it is among ``pinned``, the units of the forward in which it was taken.

    A view of a parameter may outlive the turn. Where buffers are used again (``uses`` is how many views there were at
    first) it keeps the unit whole until the forward ends; elsewhere it keeps the memory by itself.
    """

    unit: ShardUnit
    pinned: list[ShardUnit]
    uses: int | None

    @property
    def is_open(self) -> bool:
        return self.unit in self.pinned

    def close(self) -> None:
        """Let go of the unit."""
        if self.is_open and (self.uses is None or self.unit.uses() <= self.uses):
            self.pinned.remove(self.unit)
            self.unit.pins -= 1
