"""The last linear layer and its cross entropy together, a chunk of tokens at a time.

For a vocabulary of 50,000 the logits are by far the largest tensor of a training step: 2 * 4096 tokens make 1.6 GB in
float32, twice with their gradient.  Here they exist for ``chunk_size`` tokens at a time.  Their gradient is used while
they are there, in the forward pass, so backward has only to scale what is ready.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import kernels
from ..errors import ConfigurationError

_HALF = (torch.float16, torch.bfloat16)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int = 1024,
) -> torch.Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)`` without ever holding all logits.

    Args:
        hidden: (..., D).
        weight: (V, D).
        targets: (...), integers in [0, V) or ``ignore_index``.
        bias: (V,) or None.
        ignore_index: tokens with this target count for nothing.
        reduction: "mean" (over the tokens that count; NaN when there are none, as in torch) or "sum".
        chunk_size: tokens whose logits are held at once.

    Returns a float32 scalar (float64 for float64 inputs).  Besides one chunk's logits it holds, until backward, the
    gradient of ``hidden`` in its dtype and those of ``weight`` and ``bias`` in float32, all as far as needed.
    Raises ConfigurationError when the shapes do not fit together.
    """
    _check(hidden, weight, targets, bias, reduction, chunk_size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    total: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, weight, bias, targets.reshape(-1).long(), ignore_index, chunk_size, torch.is_grad_enabled()
    )
    if reduction == "sum":
        return total
    count = (targets != ignore_index).sum()
    # Chosen by where, not by dividing by zero, so that the gradients are 0 and not NaN, as in torch.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reduction: str,
    chunk_size: int,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ConfigurationError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., D) and (V, D)."
        )
    if targets.shape != hidden.shape[:-1]:
        raise ConfigurationError(
            f"hidden {tuple(hidden.shape)} needs targets of shape {tuple(hidden.shape[:-1])}, "
            f"not {tuple(targets.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigurationError(f"bias {tuple(bias.shape)} must have one entry for each of {weight.shape[0]} classes.")
    if reduction not in ("mean", "sum"):
        raise ConfigurationError(f"reduction must be 'mean' or 'sum', not {reduction!r}.")
    if chunk_size < 1:
        raise ConfigurationError(f"chunk_size must be at least 1, not {chunk_size}.")


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the tokens' losses.  Gradients are kept unscaled, of order 1, so that float16 loses none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ignore_index: int,
        chunk_size: int,
        grad_enabled: bool,
    ) -> torch.Tensor:
        needed = [grad_enabled and needs for needs in ctx.needs_input_grad[:3]]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
        grad_bias = torch.zeros(weight.shape[:1], dtype=wide, device=weight.device) if needed[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = F.linear(hidden[chunk], weight, bias)
            loss, grad_logits = _loss_and_grad_(logits, targets[chunk], ignore_index, any(needed))
            total += loss
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[chunk])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def _loss_and_grad_(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of one chunk and ``logits``, overwritten by the loss's gradient by them if that is needed."""
    losses, statistics = kernels.cross_entropy_forward(logits, targets, ignore_index=ignore_index)
    if needs_grad:
        ones = torch.ones_like(losses)
        kernels.cross_entropy_backward_(logits, targets, statistics, ones, ignore_index=ignore_index)
    return losses.sum(), logits


def _add_product(total: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """``total += grad_logits.T @ hidden``, with the sum in ``total``'s dtype."""
    left = grad_logits.t()
    with torch.autocast(total.device.type, enabled=False):
        if left.is_cuda and left.dtype in _HALF:  # tensor cores take half precision and sum in float32
            total += torch.mm(left, hidden.to(left.dtype), out_dtype=total.dtype)
        else:
            total.addmm_(left.to(total.dtype), hidden.to(total.dtype))
