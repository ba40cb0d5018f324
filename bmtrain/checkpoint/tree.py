"""State as a tree of plain values and tensors: its shape as text, its tensors by name."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedError
from ..wire import from_bytes, to_bytes

Path = tuple[Any, ...]


def encode(tree: Any, tensors: dict[str, Any], paths: dict[str, Path], is_leaf: Callable[[Any], bool]) -> str:
    """``tree`` as text, in which tensors have names; they are put into ``tensors``, and where they are into ``paths``.

    Raises CheckpointError for what is neither plain nor a tensor.
    """
    names: dict[int, str] = {}

    def walk(value: Any, path: Path) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor) or is_leaf(value):
            if id(value) not in names:
                name = ".".join(map(str, path))
                while name in tensors:
                    name += "'"
                names[id(value)], tensors[name], paths[name] = name, value, path
            return {"tensor": names[id(value)]}
        if isinstance(value, dict) and type(value).__name__ in ("dict", "OrderedDict"):
            return {"dict": [[walk(k, path), walk(v, (*path, k))] for k, v in value.items()]}
        if type(value) in (list, tuple):
            return {type(value).__name__: [walk(inner, (*path, number)) for number, inner in enumerate(value)]}
        try:
            return {"object": base64.b64encode(to_bytes(value)).decode()}
        except UnsupportedError as error:
            raise CheckpointError(f"{'.'.join(map(str, path))} is not saved: {error}") from error

    return json.dumps(walk(tree, ()))


def decode(text: str, tensor: Callable[[Path, str], Any]) -> Any:
    """The tree, with ``tensor(path, name)`` for each tensor; where that gives ABSENT, nothing is there."""

    def walk(value: Any, path: Path) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return tensor(path, inner)
        if kind == "dict":
            pairs = ((walk(k, path), v) for k, v in inner)
            made = {k: walk(v, (*path, k)) for k, v in pairs}
            return {k: v for k, v in made.items() if v is not ABSENT}
        if kind in ("list", "tuple"):
            items = [walk(item, (*path, number)) for number, item in enumerate(inner)]
            return items if kind == "list" else tuple(items)
        return from_bytes(base64.b64decode(inner))

    return walk(json.loads(text), ())


ABSENT = object()
