"""Which units running forwards need whole."""

from __future__ import annotations

from ..shard.unit import ShardUnit


class Pins:
    """A stack of running forwards, each with the units it has pinned; at the bottom none, for when none runs."""

    def __init__(self) -> None:
        self._stack: list[list[ShardUnit]] = [[]]

    @property
    def idle(self) -> bool:
        """Whether no forward is running."""
        return len(self._stack) == 1

    def begin(self) -> None:
        """A forward starts inside the present one."""
        self._stack.append([])

    def end(self) -> None:
        """The innermost forward is over."""
        self._drop(self._stack.pop())

    def add(self, unit: ShardUnit) -> None:
        """Keep ``unit`` whole until the innermost forward is over."""
        unit.pins += 1
        self._stack[-1].append(unit)

    @property
    def innermost(self) -> list[ShardUnit]:
        """What the innermost forward has pinned; empty once it is over."""
        return self._stack[-1]

    @staticmethod
    def _drop(units: list[ShardUnit]) -> None:
        for unit in units:
            unit.pins -= 1
        units.clear()
