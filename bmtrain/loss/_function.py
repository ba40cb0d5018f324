"""The published low-level functions, on tensors of any device.  They write into their arguments, without autograd."""

from __future__ import annotations

import torch


def has_inf_nan(g_half: torch.Tensor, out: torch.Tensor) -> None:
    """Set ``out`` (uint8, one element) to 1 if ``g_half`` holds an infinity or NaN; leave it otherwise."""
    out.logical_or_((~torch.isfinite(g_half)).any())


def cross_entropy_forward(
    m: int,
    n: int,
    input: torch.Tensor,
    target: torch.Tensor,
    softmax: torch.Tensor,
    output: torch.Tensor,
    ignore_index: int,
) -> None:
    """Row by row, from logits (m, n) and targets (m,): ``softmax`` (m, n) and the loss ``output`` (m,) in float32."""
    log_probs = torch.log_softmax(input.reshape(m, n), dim=1, dtype=torch.float32)
    counts = target.view(m) != ignore_index
    index = target.view(m).long().masked_fill(~counts, 0).unsqueeze(1)
    output.view(m).copy_(-log_probs.gather(1, index).squeeze(1).masked_fill(~counts, 0.0))
    softmax.view(m, n).copy_(log_probs.exp_())


def cross_entropy_backward_inplace(
    m: int, n: int, grad_output: torch.Tensor, target: torch.Tensor, x: torch.Tensor, ignore_index: int
) -> None:
    """Turn ``x``, the softmax (m, n), into the gradient of the logits, given the losses' gradient (m,)."""
    counts = target.view(m) != ignore_index
    index = target.view(m).long().masked_fill(~counts, 0).unsqueeze(1)
    rows = x.view(m, n)
    rows.scatter_add_(1, index, torch.full_like(index, -1, dtype=x.dtype))
    rows.mul_((grad_output.view(m) * counts).unsqueeze(1))


def fused_sumexp(logits: torch.Tensor, max_logits: torch.Tensor) -> torch.Tensor:
    """Row sums of ``exp(logits - max_logits)``: (m,) in float32."""
    return (logits.float() - max_logits.unsqueeze(1)).exp().sum(dim=1)


def fused_softmax_inplace(logits: torch.Tensor, max_logits: torch.Tensor, sum_exp_logits: torch.Tensor) -> None:
    """Replace ``logits`` (m, n) by their softmax, given row maxima and ``fused_sumexp``'s row sums."""
    logits.copy_((logits.float() - max_logits.unsqueeze(1)).exp() / sum_exp_logits.unsqueeze(1))
