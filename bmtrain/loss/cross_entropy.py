"""Cross entropy of logits in any floating dtype, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..context import context
from ..errors import UnsupportedError


class FusedCrossEntropy(torch.nn.Module):
    """``torch.nn.CrossEntropyLoss`` whose arithmetic is float32 whatever the logits' dtype.

    Args:
        weight: a factor for each class, shape (C,).
        ignore_index: targets with this value count for nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: the share of the target distribution that is spread evenly over all classes.
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
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.parallel = parallel

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of ``input`` (logits) against ``target`` (class numbers)."""
        if self.parallel and context().topology.tp_size > 1:
            raise UnsupportedError("FusedCrossEntropy(parallel=True) needs tensor parallelism, which this version does not have.")
        logits = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        weight = None if self.weight is None else self.weight.to(logits)
        # The published kernel took int32 targets, torch's takes int64.
        target = target.long() if not target.is_floating_point() else target
        return F.cross_entropy(logits, target, weight, None, self.ignore_index, None, self.reduction, self.label_smoothing)

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, parallel={self.parallel}"
        )
