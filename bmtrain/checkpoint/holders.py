"""What a Checkpointer is given, in one form: state out in parts, and back in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ConfigurationError
from ..shard.in_parts import InParts, in_parts
from ..shard.place import Place
from ..shard.sharded_tensor import ShardedTensor
from .model import ModelParts


class Holder(InParts, Protocol):
    """Of one thing's state; ``shard.in_parts`` says what is what."""


def holders(name: str, given: Any) -> dict[str, Holder]:
    """Of ``given``: one thing, or a list or dict of things that have state."""
    if given is None:
        return {}
    if isinstance(given, (list, tuple)) and given and all(map(_has_state, given)):
        return {f"{name}.{number}": holder(f"{name}.{number}", one) for number, one in enumerate(given)}
    if isinstance(given, dict) and given and all(map(_has_state, given.values())):
        return {f"{name}.{key}": holder(f"{name}.{key}", one) for key, one in given.items()}
    return {name: holder(name, given)}


def holder(name: str, given: Any) -> Holder:
    """Raises ConfigurationError for what cannot be put back."""
    if isinstance(given, nn.Module):
        return ModelParts(given)
    found = in_parts(given)
    if found is not None:
        return found
    if isinstance(given, (dict, list, torch.Tensor)):
        return Values(given)
    if _has_state(given):
        return Stateful(given)
    raise ConfigurationError(
        f"Checkpointer({name}=...) got a {type(given).__name__}, which a resume could not change. Give it a dict, list "
        "or tensor that your code reads its values from, or an object with state_dict and load_state_dict."
    )


def _has_state(given: Any) -> bool:
    return callable(getattr(given, "state_dict", None)) and callable(getattr(given, "load_state_dict", None))


class Stateful:
    """Any object with state_dict and load_state_dict, the same on all ranks.

    An optimizer that a manager has got since is in parts.
    """

    def __init__(self, of: Any) -> None:
        self._of = of

    def parts(self) -> dict[str, Any]:
        """As ``shard.in_parts`` says."""
        own = in_parts(self._of)
        return self._of.state_dict() if own is None else own.parts()

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        """As ``shard.in_parts`` says."""
        own = in_parts(self._of)
        return True if own is None else own.part_at(path, shape)

    def check_parts(self, state: Any) -> None:
        """By trying, if it is not in parts: only the object itself knows.  It keeps its own state."""
        own = in_parts(self._of)
        if own is not None:
            own.check_parts(state)
            return
        before = copy.deepcopy(self._of.state_dict())
        try:
            self._of.load_state_dict(copy.deepcopy(state))
        finally:
            self._of.load_state_dict(before)

    def load_parts(self, state: Any) -> None:
        """As ``shard.in_parts`` says."""
        own = in_parts(self._of)
        (self._of.load_state_dict if own is None else own.load_parts)(state)


class Values:
    """A dict, list or tensor, which gets its values back in place."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def parts(self) -> Any:
        """As ``shard.in_parts`` says."""
        return self._of

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        """A part where there is a ShardedTensor of this shape now."""
        value = self._of
        for key in path:
            try:
                value = value[key]
            except (LookupError, TypeError):
                return True
        fits = (
            isinstance(value, ShardedTensor)
            and value.part.place.whole_shape == shape
            and value.shape == value.part.place.shape
        )
        return value.part.place if fits else True

    def check_parts(self, state: Any) -> None:
        """A dict stays a dict."""
        if isinstance(self._of, torch.Tensor) != isinstance(state, torch.Tensor) or isinstance(self._of, dict) != (
            isinstance(state, dict)
        ):
            raise ConfigurationError(f"The state is a {type(state).__name__}, here it is a {type(self._of).__name__}.")

    @torch.no_grad()
    def load_parts(self, state: Any) -> None:
        """As ``shard.in_parts`` says."""
        _refill(self._of, state)


def _refill(present: Any, state: Any) -> Any:
    """``state``, in the memory and the containers of ``present`` where these fit."""
    if isinstance(present, torch.Tensor) and isinstance(state, torch.Tensor) and present.shape == state.shape:
        present.copy_(state)
        return present
    if isinstance(present, dict) and isinstance(state, Mapping):
        made = {key: _refill(present.get(key), value) for key, value in state.items()}
        present.clear()
        present.update(made)
        return present
    if isinstance(present, list) and isinstance(state, list):
        old = present + [None] * len(state)
        present[:] = [_refill(one, value) for one, value in zip(old, state, strict=False)]
        return present
    return state
