"""Recomputation of any function, under the published module name."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils.checkpoint import checkpoint as _recomputed

from .block_layer import CheckpointBlockContext

__all__ = ["CheckpointBlockContext", "checkpoint"]


def checkpoint(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Drop what ``func`` keeps for the backward, and compute it again there.

    ``checkpoint(func)`` is a function that does so, as for a decorator; ``checkpoint(func, x, y)`` calls it at once.
    A ``bmt.CheckpointBlock`` does the same for a module, and gathers its parameters; this is for other functions.
    """

    @wraps(func)
    def repeated(*args: Any, **kwargs: Any) -> Any:
        return _recomputed(func, *args, use_reentrant=False, **kwargs)

    return repeated(*args, **kwargs) if args or kwargs else repeated
