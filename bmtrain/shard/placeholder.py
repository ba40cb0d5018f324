"""What ``.data`` of a sharded parameter gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import ShardedAccessError

_WRITES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")


class Placeholder(torch.Tensor):
    """One NaN element expanded to the parameter's shape.

    Writes to it and to its views would be lost (torch itself lets some pass, like ``zero_`` and ``masked_fill_``), so
    they raise ShardedAccessError.  Everything else gives what it gives for an ordinary tensor.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        target = next(iter((*args, *kwargs.values())), None)  # torch.nn.init's functions pass all by name
        if _holds(kwargs.get("out")) or (in_place and _holds(target)):
            raise ShardedAccessError(
                f"{name} writes to .data of a parameter that is sharded over the ranks, where it would be lost. On "
                "every rank, change it inside `with bmt.gathered(module_or_parameter, write=True):`, or, if each "
                "element depends on itself alone, call the function on the parameter, without .data, under "
                "torch.no_grad()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return _follow(func(*args, **kwargs))


def _holds(target: Any) -> bool:
    return isinstance(target, Placeholder) or (isinstance(target, (list, tuple)) and any(map(_holds, target)))


def _follow(out: Any) -> Any:
    """Views of a placeholder are placeholders, too."""
    if isinstance(out, (list, tuple)) and type(out) in (list, tuple):
        return type(out)(map(_follow, out))
    return out.as_subclass(Placeholder) if isinstance(out, torch.Tensor) and out._is_view() else out
