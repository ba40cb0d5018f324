"""Loss scaling as scripts did it before OptimManager: the optimizer held the scale."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..context import context
from .norm import clip_
from .pieces import Chosen, params_of


class HoldsLossScale:
    """Mixin: ``optimizer.loss_scale(loss).backward()``, and ``step`` divides by the same scale."""

    scale: float = 1.0

    def loss_scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call ``backward`` on, so that gradients become means over ranks."""
        _say("optimizer.loss_scale(loss)")
        ctx = context()
        return loss * (self.scale * ctx.gradient_divisor / ctx.topology.data_size)


def clip_grad_norm(
    param_groups: Any, max_norm: float, scale: float = 1.0, norm_type: float | str = 2, eps: float = 1e-6
) -> torch.Tensor:
    """Clip gradients that carry the loss scale ``scale``; returns their unscaled norm.  Collective."""
    _say("bmt.optim.clip_grad_norm")
    return clip_(Chosen(params_of(param_groups)), max_norm, float(norm_type), scale, eps)


def _say(what: str) -> None:
    warnings.warn(f"{what} is old; use bmt.optim.OptimManager.", DeprecationWarning, stacklevel=3)
