"""Tensors in any nesting: tuples, dicts, dataclasses, model outputs, caches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Leaves = dict[str, Any]
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def leaves(value: Any) -> Leaves:
    """Every tensor and plain value of ``value`` by its path; containers appear with the name of their type."""
    return dict(_walk(value, "", set()))


def _walk(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, *_PLAIN)):
        yield path or "value", value
        return
    if id(value) in above:
        return
    above = above | {id(value)}
    yield f"{path}<type>", type(value).__qualname__
    if isinstance(value, Mapping):
        children: Any = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        children = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, torch.nn.Module) or callable(value):
        return
    elif isinstance(value, (set, frozenset)):
        children = ((f"{path}{{{index}}}", item) for index, item in enumerate(sorted(value, key=repr)))
    else:
        children = ((f"{path}.{name}", item) for name, item in _attributes(value).items())
    for name, item in children:
        yield from _walk(item, name, above)


def _attributes(value: Any) -> dict[str, Any]:
    slots = [slot for kind in type(value).__mro__ for slot in _names(kind.__dict__.get("__slots__", ()))]
    return {**{slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def tensors(value: Any) -> list[torch.Tensor]:
    """Only the tensors, in order."""
    return [leaf for leaf in leaves(value).values() if isinstance(leaf, torch.Tensor)]


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of ``value`` with every tensor changed; objects of other kinds are copied as they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, map_tensors(getattr(value, field.name), change))
        return made
    return copy.deepcopy(value)


def recorded(value: Any) -> Leaves:
    """``leaves`` with tensors as CPU copies that nothing changes afterwards."""
    return {path: _kept(leaf) if isinstance(leaf, torch.Tensor) else leaf for path, leaf in leaves(value).items()}


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    return plain.cpu().clone().as_subclass(torch.Tensor)
