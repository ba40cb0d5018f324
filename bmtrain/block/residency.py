"""Which units are whole now.  A small cache: any unit may be dropped, since whoever needs it gathers it again."""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..shard.flat import FlatShard
from ..shard.unit import ShardUnit


class Residency:
    """Keeps at most ``limit`` units whole beside those that running outer modules have pinned.

    ``limit`` 2 is the one in use and the one coming: the two parameter buffers per block shape.
    """

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit
        self._units: OrderedDict[int, ShardUnit] = OrderedDict()  # least recently used first
        self._storages: dict[int, FlatShard] = {}
        self._current: ShardUnit | None = None

    def need(self, unit: ShardUnit, compute: torch.dtype | None = None) -> None:
        """Make ``unit`` whole now, gathered for ``compute`` (unless it is pinned otherwise); None: as it rests."""
        if not unit.pins and not unit.fits(compute):
            self.drop(unit)
        if not unit.is_whole:
            if not unit.is_coming:
                self._make_room()
            unit.finish_gather(compute)
            for flat in unit.flats:
                assert flat.buffer is not None
                self._storages[flat.buffer.tensor.untyped_storage().data_ptr()] = flat
        self._units[unit.index] = unit
        self._units.move_to_end(unit.index)
        self._current = unit

    def expect(self, unit: ShardUnit, compute: torch.dtype | None = None) -> None:
        """Start gathering ``unit``, which will be needed next."""
        if unit.is_whole or unit.is_coming:
            return
        self._make_room()
        self._units[unit.index] = unit
        unit.start_gather(compute)

    def find(self, pointer: int) -> FlatShard | None:
        """The whole FlatShard whose buffer's storage starts at ``pointer``."""
        return self._storages.get(pointer)

    def drop(self, unit: ShardUnit) -> None:
        """Release ``unit``."""
        self._forget(unit)
        unit.release()
        self._units.pop(unit.index, None)
        if self._current is unit:
            self._current = None

    def drop_all(self) -> None:
        """Release every unit that no running forward has pinned."""
        for unit in list(self._units.values()):
            if not unit.pins:
                self.drop(unit)

    def hide_all(self) -> None:
        """Show sharded parameters to the code after a forward, but keep what is whole for the backward."""
        for unit in self._units.values():
            self.hide(unit)

    def hide(self, unit: ShardUnit) -> None:
        """The same for one, unless a running forward has pinned it."""
        if not unit.pins and unit.is_whole:
            self._forget(unit)
            unit.hide()

    def _forget(self, unit: ShardUnit) -> None:
        for flat in unit.flats:
            if flat.buffer is not None:
                self._storages.pop(flat.buffer.tensor.untyped_storage().data_ptr(), None)

    def _make_room(self) -> None:
        active = [u for u in self._units.values() if (not u.pins or u is self._current) and not u.keep]
        spare = [u for u in active if u is not self._current and not u.pins]
        for unit in spare[: max(0, len(active) + 1 - self.limit)]:
            self.drop(unit)
