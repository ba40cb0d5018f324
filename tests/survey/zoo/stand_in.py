"""Stands in for libraries that a model's package imports and the model does not use, such as torchvision.

Any submodule can be imported, any name taken from it, inherited from, or used to decorate; using one otherwise raises.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any


def stand_in(*names: str) -> None:
    """Let these be imported from now on, should they not be installed."""
    _NAMES.update(names)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


_NAMES: set[str] = set()


class _Kind(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name  # such as InterpolationMode.NEAREST


class _Missing(metaclass=_Kind):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, item: Any) -> Any:
        if not isinstance(item, (types.FunctionType, type)):
            raise RuntimeError(f"{type(self).__name__} stands in for something that is used after all")
        return item  # as a decorator

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{type(self).__name__}, of which {name} is wanted, stands in for something else")

    def __bool__(self) -> bool:
        return False  # such as the answer to whether something is installed


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what the import system looks for
    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (_Missing,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in _NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
