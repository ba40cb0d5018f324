"""Torch's losses that leave targets out, as means over what counts on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.nn import functional as F

from ..context import world_size
from .mean import over_ranks

LossT = TypeVar("LossT", bound=Callable[..., Any])
_FUNCTIONS = {torch.nn.CrossEntropyLoss: F.cross_entropy, torch.nn.NLLLoss: F.nll_loss}


def mean_over_ranks(loss: LossT) -> LossT:
    """``loss``, whose mean is over the targets that count on all ranks, each once.  What it returns is collective.

        criterion = bmt.loss.mean_over_ranks(nn.CrossEntropyLoss(ignore_index=pad))
        loss = bmt.loss.mean_over_ranks(F.cross_entropy)(logits, targets, ignore_index=pad)

    Ranks hold different numbers of targets that count; the mean over ranks of each rank's mean is not the batch's.

    Args:
        loss: CrossEntropyLoss, NLLLoss, or their functions. Other losses, and reductions other than the mean, are given
            back as they are.

    On one rank this is ``loss`` itself. Returns a 0-d tensor, the same on every rank; NaN if nothing counts.
    """
    if type(loss) in _FUNCTIONS:
        return cast(LossT, _MeanOverRanks(cast(torch.nn.Module, loss)))
    if loss not in _FUNCTIONS.values():
        return loss
    return cast(LossT, functools.wraps(loss)(functools.partial(_mean, loss)))


class _MeanOverRanks(torch.nn.Module):
    """A loss module that asks another one for its losses."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = {
            name: getattr(self.loss, name)
            for name in ("weight", "ignore_index", "reduction", "label_smoothing")
            if hasattr(self.loss, name)
        }
        return _mean(_FUNCTIONS[type(self.loss)], input, target, **given)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("loss"), name)


def _mean(
    function: Callable[..., torch.Tensor],
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *given: Any,
    **options: Any,
) -> torch.Tensor:
    if world_size() == 1 or given or options.get("reduction", "mean") != "mean" or target.is_floating_point():
        return function(input, target, weight, *given, **options)
    losses = function(input, target, weight, **{**options, "reduction": "none"})
    counts = target != options.get("ignore_index", -100)
    weights = counts.to(losses.dtype)
    if weight is not None:
        weights = weights * weight.to(losses.dtype)[target.masked_fill(~counts, 0)]
    return over_ranks(losses.float().sum() if losses.dtype.itemsize < 4 else losses.sum(), weights.sum())
