"""Linear layers whose weight gradient is computed straight into the buffer that is reduced.

Autograd would allocate each weight gradient and the reduction would copy it.  On a GPU that costs a pass over every
gradient and the memory of a second one.  Values are those of ``nn.Linear``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..context import context
from ..shard.parameter import DistributedParameter


class _LinearInto(torch.autograd.Function):
    """``F.linear``; the weight's gradient goes to its place in the reduction buffer.

    Shapes: x (..., in), weight (out, in), bias (out,) or None -> (..., out).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: DistributedParameter, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = (weight._flat, weight._index)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        flat, index = ctx.place
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        view, first = flat.landing(index)
        if first:
            torch.mm(rows.t(), x.reshape(-1, x.shape[-1]), out=view)
        else:
            view.addmm_(rows.t(), x.reshape(-1, x.shape[-1]))
        return grad_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None


class LandingLinear(nn.Linear):
    """An ``nn.Linear`` inside a shard unit on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if torch.is_autocast_enabled("cuda") and weight.dtype == torch.get_autocast_dtype("cuda"):
            x = x.to(weight.dtype)  # as autocast would
        if (
            torch.compiler.is_compiling()
            or not (torch.is_grad_enabled() and weight.requires_grad and x.dtype == weight.dtype)
            or (torch.is_autocast_enabled("cuda") and weight.dtype != torch.get_autocast_dtype("cuda"))
            or getattr(weight, "_flat", None) is None
            or not weight._flat.lands
        ):
            return super().forward(x)
        note = context().engine.recompute_note
        if note is not None:
            # Only what the first run saved is wanted; the graph is never run.  Noted before the product is computed,
            # so that a block's last one is not computed at all.
            note(x)
            note(weight)
            with torch.no_grad():
                out = F.linear(x, weight, self.bias)
            return out.requires_grad_()
        return _LinearInto.apply(x, weight, self.bias)  # type: ignore[no-untyped-call, no-any-return]


def land_gradients(module: nn.Module) -> None:
    """Let every plain ``nn.Linear`` of ``module`` compute its weight gradient in place."""
    for inner in module.modules():
        if type(inner) is nn.Linear and not inner._backward_hooks and not inner._backward_pre_hooks:
            inner.__class__ = LandingLinear
