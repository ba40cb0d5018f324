"""Collectives as differentiable functions of one tensor.

What a gradient means here: every rank runs the same program on its own data, and calls ``backward`` on its own loss.
The gradients below stay on the rank that computes them (``broadcast`` excepted), which is right when the loss is
*replicated*: computed alike on all ranks from the collective's result.  Then each rank holds the whole gradient
already, and reducing it again would count it once per rank.  A loss that differs between ranks has its gradient
summed by whoever reduces the parameters' gradients, here the sharded parameters themselves.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CommunicationError
from .base import Communicator, ReduceOp

_OPS = ("sum", "avg", "max", "min", "prod")
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
_MOST_DIMENSIONS = 48
_META_LENGTH = 2 + _MOST_DIMENSIONS  # dtype, number of dimensions, sizes


def all_gather(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Every rank's ``x``, stacked: shape (world_size, *x.shape).

    Backward: the slice of the gradient that belongs to this rank's ``x``; no communication.
    """
    result: torch.Tensor = _AllGather.apply(x, comm)  # type: ignore[no-untyped-call]
    return result


def all_reduce(x: torch.Tensor, op: ReduceOp, comm: Communicator) -> torch.Tensor:
    """``x`` reduced over ranks, the same shape, on every rank; ``x`` itself is not changed.

    ``op`` is "sum", "avg", "max", "min" or "prod".  Backward, without communication: "sum" passes the gradient on as
    it is, "avg" divides it by the number of ranks, "max" and "min" keep it where this rank's ``x`` is the result
    (every rank of a tie keeps it), "prod" multiplies it by the product of the other ranks' ``x`` (exact where an
    ``x`` is zero).
    """
    _check_op(op)
    result: torch.Tensor = _AllReduce.apply(x, op, comm)  # type: ignore[no-untyped-call]
    return result


def reduce_scatter(x: torch.Tensor, op: ReduceOp, comm: Communicator) -> torch.Tensor:
    """``x`` reduced over ranks and cut along dimension 0: this rank gets part ``rank`` of ``world_size``.

    ``op`` as for ``all_reduce``.  Backward: the ranks' gradients of their parts, gathered, then treated as by
    ``all_reduce``.
    Raises CommunicationError unless the number of ranks divides ``x.shape[0]``.
    """
    _check_op(op)
    if x.dim() == 0 or x.shape[0] % comm.world_size:
        raise CommunicationError(
            f"reduce_scatter cuts dimension 0 into {comm.world_size} equal parts, "
            f"which shape {tuple(x.shape)} does not allow."
        )
    result: torch.Tensor = _ReduceScatter.apply(x, op, comm)  # type: ignore[no-untyped-call]
    return result


def broadcast(src: torch.Tensor, root: int, comm: Communicator) -> torch.Tensor:
    """``root``'s ``src`` on every rank; ``src`` has the same shape and dtype everywhere and is not changed.

    Backward: the sum of all ranks' gradients, given to ``src`` on every rank, so that copies kept on all ranks stay
    equal.
    """
    result: torch.Tensor = _Broadcast.apply(src, root, comm)  # type: ignore[no-untyped-call]
    return result


def send_activations(hidden_state: torch.Tensor, next_rank: int, comm: Communicator) -> None:
    """Send a tensor, with dtype and shape, to ``next_rank``, which calls ``recv_activations``.  No gradient flows
    back.
    """
    if hidden_state.dtype not in _DTYPES:
        raise CommunicationError(f"send_activations does not know the dtype {hidden_state.dtype}.")
    if hidden_state.dim() > _MOST_DIMENSIONS:
        raise CommunicationError(
            f"send_activations takes at most {_MOST_DIMENSIONS} dimensions, not {hidden_state.dim()}."
        )
    facts = [_DTYPES.index(hidden_state.dtype), hidden_state.dim(), *hidden_state.shape]
    meta = torch.tensor(facts + [0] * (_META_LENGTH - len(facts)), dtype=torch.int64, device=hidden_state.device)
    comm.send(meta, next_rank)
    comm.send(hidden_state.detach().contiguous(), next_rank)


def recv_activations(prev_rank: int, comm: Communicator, device: torch.device | str = "cpu") -> torch.Tensor:
    """The tensor that ``prev_rank`` sends with ``send_activations``, as a new tensor on ``device``."""
    meta = torch.zeros(_META_LENGTH, dtype=torch.int64, device=device)
    comm.recv(meta, prev_rank)
    code, dimensions, *sizes = meta.tolist()
    hidden_state = torch.empty(sizes[:dimensions], dtype=_DTYPES[code], device=device)
    comm.recv(hidden_state, prev_rank)
    return hidden_state


def reduce_gradient(x: torch.Tensor, op: ReduceOp, comm: Communicator) -> torch.Tensor:
    """``x``, the gradient of this rank's loss, reduced over ranks ("sum" or "avg"), as part of a loss of every rank.

    Backward: the same reduction of the ranks' gradients, so that sharded parameters, which reduce theirs once more, get
    what one process would compute.
    """
    result: torch.Tensor = _ReduceGradient.apply(x, op, comm)  # type: ignore[no-untyped-call]
    return result


def _check_op(op: str) -> None:
    if op not in _OPS:
        raise CommunicationError(f"Unknown reduction {op!r}; use one of {', '.join(_OPS)}.")


def _stacked(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    whole = torch.empty((comm.world_size, *x.shape), dtype=x.dtype, device=x.device)
    comm.all_gather(x.contiguous(), whole)
    return whole


def _product_of_others(stacked: torch.Tensor, rank: int) -> torch.Tensor:
    others = torch.cat([stacked[:rank], stacked[rank + 1 :]])
    return others.prod(dim=0)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.rank = comm.rank
        return _stacked(x, comm)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[ctx.rank], None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: ReduceOp, comm: Communicator) -> torch.Tensor:
        ctx.op, ctx.world_size = op, comm.world_size
        if op == "prod":
            stacked = _stacked(x, comm)
            ctx.save_for_backward(_product_of_others(stacked, comm.rank))
            return stacked.prod(dim=0)
        result = x.clone(memory_format=torch.contiguous_format)
        comm.all_reduce(result, op)
        if op in ("max", "min"):
            ctx.save_for_backward(x == result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.op == "avg":
            grad = grad / ctx.world_size
        elif ctx.op != "sum":
            grad = grad * ctx.saved_tensors[0]
        return grad, None, None


class _ReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: ReduceOp, comm: Communicator) -> torch.Tensor:
        ctx.op, ctx.comm = op, comm
        result = x.clone(memory_format=torch.contiguous_format)
        comm.all_reduce(result, op)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_gradient(grad, ctx.op, ctx.comm), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: ReduceOp, comm: Communicator) -> torch.Tensor:
        ctx.op, ctx.comm = op, comm
        rows = x.shape[0] // comm.world_size
        if op == "prod":
            stacked = _stacked(x, comm)
            ctx.save_for_backward(_product_of_others(stacked, comm.rank))
            return stacked[:, comm.rank * rows : (comm.rank + 1) * rows].prod(dim=0)
        result = torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
        comm.reduce_scatter(x.contiguous(), result, op)
        if op in ("max", "min"):
            ctx.save_for_backward(x == _stacked(result, comm).view(x.shape))
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gathered = _stacked(grad, ctx.comm).flatten(0, 1)
        if ctx.op == "avg":
            gathered = gathered / ctx.comm.world_size
        elif ctx.op != "sum":
            gathered = gathered * ctx.saved_tensors[0]
        return gathered, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, src: torch.Tensor, root: int, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        result = src.clone(memory_format=torch.contiguous_format)
        comm.broadcast(result, root)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.comm.all_reduce(grad, "sum")
        return grad, None, None
