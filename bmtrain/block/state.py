"""What a block's forward changes of its own: buffers, counters, caches.  A second run starts where the first did."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..autograd import version_of
from ..own_random import generator_state, is_generator, is_same_state, set_generator_state
from ..shard.parameter import DistributedParameter

_RUNS = 3
"""For so many runs everything is compared; then only what has moved by then is copied before each."""

_MISSING = object()
_INTERNAL = {*nn.Module().__dict__, "_bmt"}
_CONTAINERS = (list, dict, set, deque)


@dataclass(eq=False)
class Entry:
    """A buffer or an attribute, as it was before a run: ``holder[name]`` was ``value``, which held ``content``."""

    holder: dict[str, Any]
    name: str
    value: Any
    version: int
    content: Any

    @classmethod
    def of(
        cls,
        holder: dict[str, Any],
        name: str,
        copied: bool,
        is_shared: Callable[[torch.Tensor], bool] = lambda _: False,
    ) -> Entry:
        """As it is now; ``copied``, with a copy of what it holds, unless that lies in memory that ``is_shared``."""
        value, content = holder.get(name, _MISSING), None
        if copied and _is_plain(value) and not is_shared(value):
            content = value.detach().clone()
        elif copied and isinstance(value, _CONTAINERS):
            content = copy.copy(value)
        elif copied and is_generator(value):
            content = generator_state(value)
        return cls(holder, name, value, version_of(value) if _is_plain(value) else 0, content)

    @property
    def is_copied(self) -> bool:
        """Whether it can return whatever happens to it."""
        return self.content is not None

    @property
    def moved(self) -> bool:
        """Whether it is different now."""
        if self.holder.get(self.name, _MISSING) is not self.value:
            return True
        if is_generator(self.value):
            return self.content is not None and not is_same_state(generator_state(self.value), self.content)
        if not _is_plain(self.value):
            return self.content is not None and not _same(self.value, self.content)
        # Written through .data, it keeps its version.
        return version_of(self.value) != self.version or (
            self.content is not None and not torch.equal(self.content, self.value.detach())
        )

    @property
    def can_return(self) -> bool:
        """Whether it can become what it was."""
        return self.is_copied or not _is_plain(self.value) or version_of(self.value) == self.version

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """As it was before the run inside the ``with``; as it is now after it."""
        present = None
        if self.is_copied:
            present = Entry.of(self.holder | {self.name: self.value}, self.name, True).content
            _fill_where_moved(self.value, self.content)
        try:
            with _held(self.holder, self.name, self.value):
                yield
        finally:
            if present is not None:
                _fill_where_moved(self.value, present)


class State:
    """Learns from a block's first runs what its forward moves."""

    def __init__(self) -> None:
        self._runs = 0
        self._tensors: list[tuple[dict[str, Any], str]] = []
        self._parameters: list[tuple[dict[str, Any], str]] = []
        self._generators: list[tuple[dict[str, Any], str]] = []
        self._others: list[tuple[dict[str, Any], str]] = []
        self._values: list[Any] = []  # of the others, before the run that goes on
        self._moving: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return State()  # a copy of the module has attributes of its own

    @property
    def observes(self) -> bool:
        """Whether the run that has begun is one of the first."""
        return self._runs <= _RUNS

    def before_run(self, module: nn.Module, is_shared: Callable[[torch.Tensor], bool]) -> list[Entry]:
        """Everything that may have to return for a second run.

        A view of a parameter, kept from a forward before, lies in memory that ``is_shared``: others' values are there.
        """
        self._runs += 1
        if self.observes:
            self._parameters = [(h, name) for h in (m._parameters for m in module.modules()) for name in h]
            places = [(holder, name) for holder in _holders(module) for name in holder if name not in _INTERNAL]
            self._tensors = [(h, n) for h, n in places if _is_plain(h[n])]
            self._generators = [(h, n) for h, n in places if is_generator(h[n])]
            self._others = [(h, n) for h, n in places if not (_is_plain(h[n]) or is_generator(h[n]))]
            known = {(id(h), n) for h, n in places}
            places += [place for key, place in self._moving.items() if key not in known]
            return [Entry.of(h, n, True, is_shared) for h, n in places] + self._in_place_of_parameters()
        self._values = [h.get(n, _MISSING) for h, n in self._others]
        watched = [Entry.of(h, n, False) for h, n in self._tensors if (id(h), n) not in self._moving]
        # Generators that have not drawn yet may begin to: nothing else tells that they moved.
        generators = [(h, n) for h, n in self._generators if (id(h), n) not in self._moving]
        moving = [Entry.of(h, n, True, is_shared) for h, n in (*self._moving.values(), *generators)]
        return watched + moving + self._in_place_of_parameters()

    def _in_place_of_parameters(self) -> list[Entry]:
        """What torch.func.functional_call has put there, for one forward."""
        places = self._parameters
        return [Entry.of(h, n, False) for h, n in places if not isinstance(h.get(n), DistributedParameter | None)]

    def after_run(self, module: nn.Module, before: list[Entry]) -> list[Entry]:
        """Those of ``before`` that the run has moved, beside those known to move, and what is new."""
        moved = [entry for entry in before if (self.observes or not entry.is_copied) and entry.moved]
        if self.observes:
            known = {(id(entry.holder), entry.name) for entry in before}
            moved += [
                Entry(holder, name, _MISSING, 0, None)
                for holder in _holders(module)
                for name in holder
                if name not in _INTERNAL and (id(holder), name) not in known
            ]
        else:  # one that begins to be replaced only now
            moved += [
                Entry(holder, name, value, 0, None)
                for (holder, name), value in zip(self._others, self._values, strict=True)
                if holder.get(name, _MISSING) is not value and (id(holder), name) not in self._moving
            ]
        for entry in moved:
            self._moving[id(entry.holder), entry.name] = (entry.holder, entry.name)
        return moved


def state_for_pickle(module: nn.Module) -> dict[str, object]:
    """What pickle and copy take of ``module``; before Python 3.11 not every object says so itself."""
    found: dict[str, object] = getattr(module, "__getstate__", lambda: module.__dict__)()
    return found


def attribute(owner: object, name: str, value: object) -> AbstractContextManager[None]:
    """An attribute of ``owner`` itself, as a module, inside the ``with``."""
    return _held(owner.__dict__, name, value)


@contextmanager
def _held(holder: dict[str, Any], name: str, value: object) -> Iterator[None]:
    present = holder.get(name, _MISSING)
    _put(holder, name, value)
    try:
        yield
    finally:
        _put(holder, name, present)


def _put(holder: dict[str, Any], name: str, value: object) -> None:
    if value is _MISSING:
        holder.pop(name, None)
    else:
        holder[name] = value


def _holders(module: nn.Module) -> Iterator[dict[str, Any]]:
    for inner in module.modules():
        yield inner.__dict__
        buffers = inner.__dict__.get("_buffers")
        if isinstance(buffers, dict):
            yield buffers


def _is_plain(value: Any) -> bool:
    return type(value) is torch.Tensor and value.layout == torch.strided and not value.is_meta


def _fill(value: Any, content: Any) -> None:
    if _is_plain(value):
        value.data.copy_(content)  # past autograd's version count: the same values return
        return
    if is_generator(value):
        set_generator_state(value, content)
        return
    kind: Any = next(kind for kind in (OrderedDict, *_CONTAINERS) if isinstance(value, kind))
    kind.clear(value)  # of the kind itself: a class that freezes its items may refuse it
    (kind.update if isinstance(value, dict | set) else kind.extend)(value, content)


def _fill_where_moved(value: Any, content: Any) -> None:
    """The same; a container that holds what it held is not touched."""
    if not isinstance(value, _CONTAINERS) or not _same(value, content):
        _fill(value, content)


def _same(value: Any, content: Any) -> bool:
    """Whether no element has come, gone or been exchanged."""
    pairs = [(value, content)] + ([(value.values(), content.values())] if isinstance(value, dict) else [])
    return len(value) == len(content) and all(a is b for p, q in pairs for a, b in zip(p, q, strict=True))
