"""Which models are in their first steps, at which scripts are looked at."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from ...shard.gathered import units_of
from ...shard.unit import ShardUnit

_MOST = 4
"""At no more steps of a model anybody looks."""
_PATIENCE = 8
"""So many steps in which a model runs, and another is trained, count as one of its own."""
_OLD = 1 << 30


class FirstSteps:
    """Counts the optimizer steps of each model: of what is called outside of any other, and has sharded parameters.

    A step is a model's in which an optimizer has changed some of its parameters, whatever else runs.  All ranks count
    alike, since they call the same models and step together.

    Attributes:
        age: how many steps the youngest model has made that was called since the last step before it.
    """

    def __init__(self) -> None:
        self.age = _OLD
        self._known: dict[int, _Model] = {}
        self._present: list[_Model] = []  # called since the last step before that
        self._updated: weakref.WeakSet[ShardUnit] = weakref.WeakSet()
        self._shardings = 0
        self._is_over = False  # whether an optimizer has stepped since they were called

    def sharded(self) -> None:
        """A module was sharded, which may have become part of a model."""
        self._shardings += 1

    def note(self, model: nn.Module) -> tuple[int, bool]:
        """An outermost forward of ``model`` begins under autograd.

        Returns how many steps it has made, and whether it, or a part of it, was never called before.
        """
        known = self._known.get(id(model))
        if known is not None and known.model() is not model:
            known = None
        is_new = False
        if known is None or known.shardings != self._shardings:
            units = weakref.WeakSet(units_of(model))
            is_new = bool(units) and (known is None or not units <= known.units)
            if known is None or is_new:
                self._known = {key: one for key, one in self._known.items() if one.model() is not None}
                known = self._known[id(model)] = _Model(model)
            known.units, known.shardings = units, self._shardings
        if not known.units:  # which a rank may call by itself
            return _OLD, False
        if self._is_over:
            self._begin()
        if known not in self._present:
            self._present.append(known)
            self.age = min(self.age, known.age)
        return known.age, is_new

    def _begin(self) -> None:
        for model in self._present:
            model.runs += 1
            model.is_counted = False
        self.age, self._present, self._is_over = _OLD, [], False

    def updated(self, units: Iterable[ShardUnit]) -> None:
        """An optimizer has changed ``units``."""
        if self.age < _MOST:
            self._updated.update(units)

    def optimizer_stepped(self) -> None:
        """An optimizer has changed all that it has."""
        self._is_over = True
        if self.age >= _MOST:
            return
        for model in self._present:
            if not model.is_counted and (not model.trains or not model.units.isdisjoint(self._updated)):
                model.is_counted = True
                model.steps += 1
        self._updated.clear()


class _Model:
    """What is known of one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.units: weakref.WeakSet[ShardUnit] = weakref.WeakSet()
        self.shardings = -1
        self.steps = self.runs = 0
        self.is_counted = False

    @property
    def age(self) -> int:
        """How many steps it has made."""
        return max(self.steps, self.runs // _PATIENCE)

    @property
    def trains(self) -> bool:
        """Whether it has parameters to be stepped on; else what is around it is trained, as a prompt."""
        return any(flat.trainable for unit in self.units for flat in unit.flats)
