"""A place to put values under a name while looking for a mistake, and to find them again anywhere in the process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_values: dict[str, Any] = {}


def clear(key: str | None = None) -> None:
    """Forget the value of ``key``, or all values."""
    if key is None:
        _values.clear()
    else:
        _values.pop(key, None)


def set(key: str, value: object) -> None:
    """Keep ``value`` under ``key``."""
    _values[key] = value


def get(key: str, default: Any = None) -> Any:
    """What is kept under ``key``, or ``default``."""
    return _values.get(key, default)


def append(key: str, value: Any) -> None:
    """Add ``value`` to the list under ``key``, which is made when it is not there."""
    _values.setdefault(key, []).append(value)


def extend(key: str, value: Iterable[Any]) -> None:
    """Add every element of ``value`` to the list under ``key``, which is made when it is not there."""
    _values.setdefault(key, []).extend(value)
