"""Cross entropy whose classes are split over ranks."""

from __future__ import annotations

from typing import Any

import torch

from ..comm import Communicator


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    comm: Communicator,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of every token, the same on every rank, in float32; 0 where the target is ``ignore_index``.

    Args:
        logits: (N, C / world_size): this rank's slice of the classes, equally large on every rank of ``comm``.
        targets: (N,), class numbers in [0, C), the same on every rank.
    """
    result: torch.Tensor = _VocabParallel.apply(  # type: ignore[no-untyped-call]
        logits, targets, comm, ignore_index, label_smoothing
    )
    return result


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        comm: Communicator,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        wide = logits.float()
        classes = logits.shape[1] * comm.world_size
        counts = targets != ignore_index
        index = targets.long() - comm.rank * logits.shape[1]
        mine = counts & (index >= 0) & (index < logits.shape[1])
        index = index.masked_fill(~mine, 0).unsqueeze(1)

        highest = wide.amax(dim=1)
        comm.all_reduce(highest, "max")
        shifted = wide - highest.unsqueeze(1)
        exponentials = shifted.exp()
        # One reduction for all sums: of exponentials, of the target's logit (on one rank only), of all logits.
        sums = torch.stack([
            exponentials.sum(dim=1), shifted.gather(1, index).squeeze(1).masked_fill(~mine, 0.0), shifted.sum(dim=1)
        ])  # fmt: skip
        comm.all_reduce(sums, "sum")
        normalizer, target_logit, logit_sum = sums
        loss = normalizer.log() - (1 - label_smoothing) * target_logit - label_smoothing * logit_sum / classes

        ctx.save_for_backward(exponentials / normalizer.unsqueeze(1), index, mine, counts)
        ctx.smoothing, ctx.classes, ctx.dtype = label_smoothing, classes, logits.dtype
        losses: torch.Tensor = loss.masked_fill(~counts, 0.0)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        softmax, index, mine, counts = ctx.saved_tensors
        grad = softmax - ctx.smoothing / ctx.classes
        grad.scatter_add_(1, index, ((ctx.smoothing - 1) * mine).unsqueeze(1).to(grad.dtype))
        grad *= (grad_loss * counts).unsqueeze(1)
        return grad.to(ctx.dtype), None, None, None, None
