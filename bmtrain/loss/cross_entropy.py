"""Cross entropy of logits in any floating dtype, computed in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import kernels
from ..context import context, world_size
from ..errors import ConfigurationError, UnsupportedError
from .mean import over_ranks
from .vocab_parallel import vocab_parallel_cross_entropy


class FusedCrossEntropy(torch.nn.Module):
    """``torch.nn.CrossEntropyLoss`` whose arithmetic is float32 whatever the logits' dtype.

    Args:
        weight: a factor for each class, shape (C,).
        ignore_index: targets with this value count for nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: the share of the target distribution that is spread evenly over all classes.
        over_ranks: divide by the number of targets that count on all ranks, not on this one, while gradients are
            computed: so "mean" is the mean of the whole batch, however its targets lie on the ranks.  Collective then.
            False: this rank's own mean, always.
        parallel: the logits hold only this rank's slice of the classes, split over the tensor-parallel group.

    Call it with logits of shape (N, C) (or (N, C, d1, ...)), which may have any strides, and targets of shape (N,)
    (or (N, d1, ...)).  The loss is float32 for half precision logits and has the logits' dtype otherwise.
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        parallel: bool = False,
        *,
        over_ranks: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.parallel = parallel
        self.over_ranks = over_ranks

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of ``input`` (logits) against ``target`` (class numbers)."""
        if self._is_split and (self.weight is not None or target.is_floating_point() or input.dim() != 2):
            raise UnsupportedError(
                "FusedCrossEntropy(parallel=True) takes logits (N, C / tp_size) and class numbers (N,), and no weight."
            )
        # The published kernel took int32 targets, torch's takes int64.
        target = target if target.is_floating_point() else target.long()
        if self.reduction == "mean" and self.over_ranks and torch.is_grad_enabled() and input.requires_grad:
            if world_size() > 1:
                return over_ranks(self._loss(input, target, "sum"), self._count(input, target))
        return self._loss(input, target, self.reduction)

    @property
    def _is_split(self) -> bool:
        """Whether the logits are of some classes only."""
        return self.parallel and context().tensor_group.world_size > 1

    def _loss(self, input: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        if self._is_split:
            group = context().tensor_group
            losses = vocab_parallel_cross_entropy(input, target, group, self.ignore_index, self.label_smoothing)
            if reduction == "none":
                return losses
            return losses.sum() if reduction == "sum" else losses.sum() / self._count(input, target)
        weight = self.weight
        if input.is_cuda and kernels.compiled() and input.dim() == 2 and target.dim() == 1:
            return fused_cross_entropy(input, target, weight, self.ignore_index, reduction, self.label_smoothing)
        logits = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        weight = None if weight is None else weight.to(logits)
        return F.cross_entropy(logits, target, weight, None, self.ignore_index, None, reduction, self.label_smoothing)

    def _count(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What a mean divides by."""
        if target.is_floating_point():
            return torch.tensor(input.numel() // input.shape[min(1, input.dim() - 1)], device=input.device)
        counted = target != self.ignore_index
        if self.weight is None:
            return counted.sum()
        return self.weight.to(input.device)[target.masked_fill(~counted, 0)].masked_fill(~counted, 0.0).sum()

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, parallel={self.parallel}"
        )


def fused_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> torch.Tensor:
    """Cross entropy in one pass forward and one backward, keeping nothing in float32 but a few numbers a row.

    ``logits`` (N, C), ``target`` (N,) int64; the rest as for FusedCrossEntropy.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ConfigurationError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}.")
    weight = None if weight is None else weight.to(logits.device, torch.float32).contiguous()
    losses: torch.Tensor = _RowLosses.apply(  # type: ignore[no-untyped-call]
        logits, target.contiguous(), weight, ignore_index, label_smoothing
    )
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    counted = target != ignore_index
    if weight is None:
        return losses.sum() / counted.sum()
    return losses.sum() / weight[target.masked_fill(~counted, 0)].masked_fill(~counted, 0.0).sum()


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        # The kernel takes any row stride, but the classes of a row must lie side by side.
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        ctx.options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        losses, statistics = kernels.cross_entropy_forward(logits, target, weight=weight, **ctx.options)
        ctx.save_for_backward(logits, target, weight, statistics)
        return losses

    @staticmethod
    def backward(ctx: Any, row_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target, weight, statistics = ctx.saved_tensors
        grad = logits.clone(memory_format=torch.contiguous_format)  # the caller may still want the logits
        kernels.cross_entropy_backward_(grad, target, statistics, row_grad.contiguous(), weight=weight, **ctx.options)
        return grad, None, None, None, None
