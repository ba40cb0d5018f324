"""Linear layers whose weight gradient is computed straight into the buffer that is reduced.

Autograd would allocate each weight gradient and the reduction would copy it.  On a GPU that costs a pass over every
gradient and the memory of a second one.  Values are those of ``nn.Linear``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..autograd import accumulator_among_inputs, is_accumulated, runs_as_written
from ..context import context
from ..errors import UnsupportedError
from ..shard.engine import engine
from ..shard.flat import FlatShard, flat_of, place_of
from ..shard.parameter import DistributedParameter

_LARGE = 2**23
"""Elements from which saving a copy of the gradient is worth the host's time for it, some 60 microseconds a layer: a
GPU copies so many in bf16 in about 10, and computes for some hundreds on such a layer, so that the host is ahead."""


class _LinearInto(torch.autograd.Function):
    """``F.linear``; the weight's gradient goes to its place in the reduction buffer.

    Shapes: x (..., in), weight (out, in), bias (out,) or None -> (..., out).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: DistributedParameter, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place_of(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @runs_as_written
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        rows, grad_weight = grad.reshape(-1, grad.shape[-1]), None
        accumulated = is_accumulated(ctx.next_functions[1][0])
        if accumulated is None or torch.is_grad_enabled():  # somebody gets it, or differentiates it again
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        elif accumulated:
            flat, index = ctx.place
            _land(flat, index, rows, x)
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class _CompiledLinearInto(torch.autograd.Function):
    """The same inside compiled code, where tensors are known by their memory alone and operators are opaque."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @runs_as_written
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = torch.ops.bmtrain.linear_backward(grad, x, weight)
        return grad_x, None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.biased else None


def _linear_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The input's gradient; as a side effect the weight's goes to where it is reduced from."""
    flat = engine().whole_flat(weight)
    if flat is None:
        raise UnsupportedError(
            "A compiled linear layer was run with a weight that is not its own. Do not compile it, or do not call it "
            "through torch.func.functional_call."
        )
    index = flat.index_at(int(weight.storage_offset()))
    if _is_watched(flat.params[index]):
        raise UnsupportedError(
            f"A hook on {flat.names[index]!r} would not be called from compiled code: register it before compiling, or "
            "do not compile this block."
        )
    rows = grad.reshape(-1, grad.shape[-1])
    accumulated = is_accumulated(accumulator_among_inputs(flat.params[index]))
    if accumulated is None:
        raise UnsupportedError(
            f"torch.autograd.grad cannot return the gradient of {flat.names[index]!r} from compiled code: do not "
            "compile this block, or use OptimManager.backward and bmt.gather_grad."
        )
    if not accumulated:
        pass
    elif flat.lands:
        _land(flat, index, rows, x)
    else:
        flat.add_raw_grad(index, rows.t() @ x.reshape(-1, x.shape[-1]))
    return grad @ weight


_LIBRARY = torch.library.Library("bmtrain", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear_backward(Tensor grad, Tensor x, Tensor weight) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("bmtrain::linear_backward", lambda grad, x, weight: grad @ weight, lib=_LIBRARY)


def _land(flat: FlatShard, index: int, rows: torch.Tensor, x: torch.Tensor) -> None:
    view, first = flat.landing.place(index)
    if first:
        torch.mm(rows.t(), x.reshape(-1, x.shape[-1]), out=view)
    else:
        view.addmm_(rows.t(), x.reshape(-1, x.shape[-1]))


def _is_watched(weight: torch.Tensor) -> bool:
    """Whether somebody wants to see the gradient on its way."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


class LandingLinear(nn.Linear):
    """An ``nn.Linear`` inside a shard unit on a GPU."""

    lands_compiled = False
    """Whether compiled code does so, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        autocast = context().device.autocast()
        mixed = autocast is not None
        if mixed and weight.dtype == autocast:
            x, mixed = x.to(weight.dtype), False  # as autocast would
        plain = mixed or not (torch.is_grad_enabled() and weight.requires_grad and x.dtype == weight.dtype)
        if torch.compiler.is_compiling():
            if plain or not x.requires_grad or not self.lands_compiled:
                return super().forward(x)
            return _CompiledLinearInto.apply(x, weight, self.bias)  # type: ignore[no-untyped-call, no-any-return]
        flat = flat_of(weight)
        if plain or _is_watched(weight) or flat is None or not flat.lands:
            return super().forward(x)
        note = engine().recompute_note
        if note is not None:
            # Only what the first run saved is wanted; the graph is never run.  Noted before the product is computed,
            # so that a block's last one is not computed at all.
            note(x)
            note(weight)
            with torch.no_grad():
                out = F.linear(x, weight, self.bias)
            return out.requires_grad_()
        return _LinearInto.apply(x, weight, self.bias)  # type: ignore[no-untyped-call, no-any-return]

    def _get_name(self) -> str:
        return "Linear"


def lands(weight: torch.Tensor) -> bool:
    """Whether the weight of a plain ``nn.Linear`` is so large that its gradient is computed in place."""
    return weight.numel() >= _LARGE


def land_gradients(module: nn.Module) -> None:
    """Let every plain ``nn.Linear`` of ``module`` with a large weight compute its weight gradient in place."""
    for inner in module.modules():
        if type(inner) is not nn.Linear or inner._backward_hooks or inner._backward_pre_hooks:
            continue
        if lands(inner.weight):
            inner.__class__ = LandingLinear


def land_compiled(module: nn.Module) -> None:
    """Let compiled code of ``module`` do the same; it can where weights are gathered, and nobody watches gradients.

    Where blocks are to be recorded it leaves gradients to autograd, which returns them from a recording.
    """
    can = context().world_size > 1 and context().graphs is not True
    for inner in module.modules():
        if isinstance(inner, LandingLinear):
            inner.__dict__["lands_compiled"] = can and not _is_watched(inner.weight)


def leave_to_autograd(module: nn.Module) -> None:
    """Let compiled code of ``module`` compute weight gradients as autograd does; it is compiled anew if it did not."""
    for inner in module.modules():
        if isinstance(inner, LandingLinear) and inner.lands_compiled:
            inner.__dict__["lands_compiled"] = False
