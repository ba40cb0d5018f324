"""Whether what the Python of a module may read is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeVar

import torch
from torch import nn

from .may_read import CONSTANTS, Executed, MayRead, contents

T = TypeVar("T")


class Facts:
    """What the Python of ``module``'s forward and backward may read, as it is when this is made.

    Attributes:
        reason: why it cannot be compared; None if it can.
        unseen: why there may be more than what is compared; None if nothing says so.
    """

    def __init__(self, module: nn.Module, executed: Executed) -> None:
        found = MayRead(module, executed)
        self.reason, self.unseen = found.reason, found.unseen
        held: list[Any] = [*found.dicts, *found.others]
        self._dicts = {id(of): of for of in found.dicts if of}
        self._others = {id(of): of for of in found.others if of}
        self._empty = list({id(of): of for of in held if not of}.values())
        self._names = [(space, itemgetter(*names, names[0])) for space, names in _each_once(found.names)]
        self._slots = [(value, attrgetter(*names, names[0])) for value, names in _each_once(found.slots)]
        self._cells = list({id(cell): cell for cell in found.cells}.values())
        self._asked = {key: (ask, ask()) for key, ask in found.asked.items()}
        self._tensors = {id(tensor): (tensor, tensor.data_ptr()) for tensor in found.tensors}
        self._parameters = list(module.parameters())
        self._trains = _flags(self._parameters)
        self._modules = list(module.modules())
        self._holders = [inner.__dict__ for inner in self._modules]
        self._attributes = self._attributes_now()
        self._values = self._present()

    def _present(self) -> list[Any]:
        of_dicts = chain.from_iterable([of.values() for of in self._dicts.values()])
        of_others = chain.from_iterable(self._others.values())
        named = chain.from_iterable([names(space) for space, names in self._names])
        in_slots = chain.from_iterable([names(value) for value, names in self._slots])
        return [*of_dicts, *of_others, *named, *in_slots, *map(contents, self._cells)]

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        try:
            present = self._present()
        except (KeyError, AttributeError):  # a name is gone
            return False
        if not _are_same(present, self._values) or any(self._empty):
            return False
        if _flags(self._parameters) != self._trains:
            return False
        if any(tensor.data_ptr() != place for tensor, place in self._tensors.values()):
            return False
        return all(_is_same(ask(), answer) for ask, answer in self._asked.values())

    def attributes_hold(self) -> bool:
        """Whether the attributes of the module, and of those inside, are as they were: a quick part of all."""
        return _are_same(self._attributes_now(), self._attributes)

    def _attributes_now(self) -> list[Any]:
        return [*map(type, self._modules), *chain.from_iterable([holder.values() for holder in self._holders])]

    def trained(self) -> list[torch.Tensor]:
        """Parameters that require a gradient."""
        return [p for p, trains in zip(self._parameters, self._trains, strict=True) if trains]


def _each_once(pairs: Sequence[tuple[T, str]]) -> list[tuple[T, list[str]]]:
    """What has names, with all of them; getters by two names or more give a tuple."""
    found: dict[int, tuple[T, dict[str, None]]] = {}
    for holder, name in pairs:
        found.setdefault(id(holder), (holder, {}))[1][name] = None
    return [(holder, [*names]) for holder, names in found.values()]


def _are_same(values: list[Any], others: list[Any]) -> bool:
    if len(values) != len(others):
        return False
    return all(map(is_, values, others)) or all(map(_is_same, values, others))


def _is_same(one: object, other: object) -> bool:
    """Whether code that reads either does the same; tensors are asked for no values."""
    return one is other or (type(one) is type(other) and isinstance(one, CONSTANTS) and one == other)


def _flags(parameters: Sequence[nn.Parameter]) -> list[bool]:
    with torch._C.DisableTorchFunctionSubclass():
        return [parameter.requires_grad for parameter in parameters]
