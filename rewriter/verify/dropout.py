"""Dropout that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_FUNCTIONAL = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def no_dropout() -> Callable[[], None]:
    """Dropout becomes the identity: on several ranks it draws other numbers than on one. Returns what undoes it."""
    functional: Any = torch.nn.functional
    before = [(functional, name, getattr(functional, name)) for name in _FUNCTIONAL]
    before += [(torch, "dropout", torch.dropout)]
    attention = functional.scaled_dot_product_attention
    before += [(functional, "scaled_dot_product_attention", attention)]

    def identity(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return input

    def still(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **kwargs: Any) -> Any:
        return attention(query, key, value, attn_mask, 0.0, **kwargs)

    for owner, name, _ in before[:-1]:
        setattr(owner, name, identity)
    functional.scaled_dot_product_attention = still

    def undo() -> None:
        for owner, name, function in before:
            setattr(owner, name, function)

    return undo
