"""Running a block's forward once more, as it ran the first time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..autograd import version_of
from ..errors import ConfigurationError
from ..shard.unit import unit_of_flat
from .record import record_of
from .saved import Buffers, PlaceInFlat
from .state import Entry
from .surroundings import Surroundings
from .whole_units import release_pins


@dataclass(frozen=True, eq=False)
class _Borrowed:
    """A block's input that is a view of a parameter. Not a tuple, so that it is a leaf among the inputs."""

    place: PlaceInFlat
    requires_grad: bool


_DEEP = 6
"""How far into an object it is looked."""


def _may_be_filled(value: object) -> bool:
    """Whether an input is an object that a forward may put something into, as a cache of keys and values."""
    known = isinstance(value, torch.Tensor | nn.Module | type | _Borrowed) or callable(value)
    return not known and isinstance(getattr(value, "__dict__", None), dict)


def _all_inside(objects: list[Any]) -> list[tuple[object, int]]:
    """Everything that objects hold, also in what these hold, with the versions of tensors."""
    found: list[tuple[object, int]] = []
    seen: set[int] = set()
    waiting = [(value, 0) for value in objects]
    while waiting:
        value, deep = waiting.pop()
        found.append((value, version_of(value) if isinstance(value, torch.Tensor) else 0))
        if id(value) in seen or deep == _DEEP:
            continue
        seen.add(id(value))
        held: list[Any] = []
        if isinstance(value, Mapping):
            held = [*value, *value.values()]
        elif isinstance(value, list | tuple | set | deque):
            held = list(value)
        if _may_be_filled(value):
            held += vars(value).values()
        waiting += [(item, deep + 1) for item in held]
    return found


def _are_same(before: list[tuple[object, int]], now: list[tuple[object, int]]) -> bool:
    return len(before) == len(now) and all(a is b and x == y for (a, x), (b, y) in zip(before, now, strict=True))


class Repeat:
    """A forward that can be run once more with the same generators and surroundings.

    Attributes:
        is_observed: whether this is one of a block's first runs, of which it is seen whether it does the same twice.
    """

    def __init__(
        self, buffers: Buffers, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._buffers, self._device = buffers, buffers.device
        self._call, self._inputs = call, self._kept((args, kwargs))
        leaves = tree_leaves(self._inputs)
        self._versions = [version_of(t) for t in leaves if isinstance(t, torch.Tensor)]
        self._objects = [leaf for leaf in leaves if _may_be_filled(leaf)]
        self._inside = _all_inside(self._objects)
        self._surroundings = Surroundings()
        module: Any = getattr(call, "__self__", None)
        self._module: nn.Module = module
        self._record = record_of(module) if isinstance(module, nn.Module) else None
        self._before = [] if self._record is None else self._record.state.before_run(module, buffers.holds)
        self.is_observed = self._record is not None and self._record.state.observes
        self._rng = self._device.rng_state()

    @property
    def watches(self) -> bool:
        """Whether the block has state that its forward may move, or is given an object that it may fill."""
        return bool(self._before or self._objects)

    def first_run_is_over(self) -> bool:
        """Learn what has moved.  Returns whether it can be put back for a second run."""
        self._surroundings.settle()
        inside, self._inside = self._inside, []
        filled = bool(self._objects) and not _are_same(inside, _all_inside(self._objects))
        record = self._record
        if record is None:
            return not filled
        moved = record.state.after_run(self._module, self._before)
        self._before += [entry for entry in moved if entry not in self._before]
        return not filled and all(entry.can_return for entry in moved)

    def __call__(self) -> Any:
        if self._versions != [version_of(t) for t in tree_leaves(self._inputs) if isinstance(t, torch.Tensor)]:
            raise ConfigurationError(
                "A recomputed block changed one of its inputs in place (or the input was changed after it ran), so it "
                "cannot be run again from that input. Use bmt.Block(..., use_checkpoint=False) for it, or write "
                "x = x + y for x += y."
            )
        present = self._device.rng_state()
        self._device.set_rng_state(self._rng)
        try:
            with ExitStack() as stack:
                args, kwargs = self._detached(stack)
                stack.enter_context(torch.enable_grad())
                stack.enter_context(self._surroundings.again())
                for entry in self._before:
                    if entry.is_copied or entry.moved:
                        stack.enter_context(self._rewound(entry))
                return self._call(*args, **kwargs)
        finally:
            self._device.set_rng_state(present)

    def _rewound(self, entry: Entry) -> AbstractContextManager[None]:
        if not entry.can_return:
            raise ConfigurationError(
                f"{entry.name!r} of a recomputed {type(self._module).__name__} was changed in place between its "
                "forward and its backward, so it cannot run again as it did. Use bmt.Block(..., use_checkpoint=False)."
            )
        return entry.rewound()

    def _kept(self, inputs: Any) -> Any:
        """``inputs`` to be held until the backward: without gather buffers, which by then hold other values."""
        made: dict[int, _Borrowed] = {}

        def kept(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
                return value
            flat = self._buffers.flat_at(value)
            if flat is None:
                return value
            return made.setdefault(id(value), _Borrowed(PlaceInFlat.of(value, flat), value.requires_grad))

        return tree_map(kept, inputs)

    def _detached(self, stack: ExitStack) -> Any:
        """Copies of the inputs outside the graph; what was one tensor stays one (attention asks ``query is key``).

        Parts of gather buffers are whole again until ``stack`` ends.
        """
        made: dict[int, torch.Tensor] = {}

        def detached(value: Any) -> Any:
            if not isinstance(value, (torch.Tensor, _Borrowed)) or isinstance(value, torch.nn.Parameter):
                return value
            if id(value) not in made:
                present = self._present(value, stack) if isinstance(value, _Borrowed) else value
                made[id(value)] = present.detach().requires_grad_(value.requires_grad)
            return made[id(value)]

        return tree_map(detached, self._inputs)

    def _present(self, borrowed: _Borrowed, stack: ExitStack) -> torch.Tensor:
        unit = unit_of_flat(borrowed.place.flat)
        tensor = self._buffers.rebuild(borrowed.place, self._device.autocast())
        unit.pins += 1
        stack.callback(release_pins, [unit])
        return tensor
