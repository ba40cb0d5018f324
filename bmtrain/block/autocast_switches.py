"""Which modules compute with autocast switched off though their caller switched it on."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType

import torch
from torch import nn


def switches_autocast(cls: type[nn.Module]) -> bool:
    """Whether code of ``cls``, or a function that it calls by name, may run with ``autocast(enabled=False)``.

    Read from compiled code, so that no source is needed.  A yes for a class that never does it costs bandwidth; a no
    for one that does it by ways of its own shows as torch's error about dtypes.
    """
    return any(
        _switches(function) or any(map(_switches, _called(function)))
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for function in vars(base).values()
        if isinstance(function, FunctionType)
    )


def _switches(function: FunctionType) -> bool:
    decorated = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    if any(isinstance(held, torch.autocast) and not held._enabled for held in decorated):
        return True
    inner = _innermost(function)
    return _mentions(function.__code__) or (inner is not function and _switches(inner))


def _is_filled(cell: object) -> bool:
    try:
        return cell.cell_contents is not None  # type: ignore[attr-defined]
    except ValueError:
        return False


def _mentions(code: CodeType) -> bool:
    """Whether ``autocast`` is named, and something that may switch it off."""
    if "autocast" in code.co_names:
        words = [const for const in code.co_consts if isinstance(const, tuple)]
        if any(const is False for const in code.co_consts) or any("enabled" in tuple_ for tuple_ in words):
            return True
    return any(_mentions(const) for const in code.co_consts if isinstance(const, CodeType))


def _called(function: FunctionType) -> Iterator[FunctionType]:
    """Functions of user code that ``function`` names."""
    for name in _innermost(function).__code__.co_names:
        found = function.__globals__.get(name)
        if isinstance(found, FunctionType) and not found.__module__.startswith("torch."):
            yield found


def _innermost(function: FunctionType) -> FunctionType:
    """What decorators wrap."""
    inner = getattr(function, "__wrapped__", None)
    return _innermost(inner) if isinstance(inner, FunctionType) else function
