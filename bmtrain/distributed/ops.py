"""``comm.ops`` with the world as the default communicator."""

from __future__ import annotations

from functools import partial

import torch

from ..comm import Communicator, ReduceOp, ops
from ..context import context
from ..log import warn
from ..users_code import users_line
from .nccl import recv as ncclRecv
from .nccl import send as ncclSend

__all__ = [
    "all_gather", "all_reduce", "broadcast", "ncclRecv", "ncclSend", "recv_activations", "reduce_scatter",
    "send_activations",
]  # fmt: skip


def all_gather(x: torch.Tensor, comm: Communicator | None = None) -> torch.Tensor:
    """Every rank's ``x``, stacked: shape (world_size, *x.shape).

    Backward: the slice of the gradient that belongs to this rank's ``x``; no communication.  Of a loss over all ranks'
    rows, the mean over ranks of what comes back is then 1/N of the gradient, which is said once; ``bmt.gather_batch``
    passes back all of it.
    """
    comm = comm or _world_for(x)
    gathered = ops.all_gather(x, comm)
    if comm.world_size > 1 and gathered.requires_grad and context().rank == 0:
        gathered.register_hook(partial(_say_what_comes_back, users_line()))  # type: ignore[no-untyped-call]
    return gathered


def _say_what_comes_back(place: str, _: torch.Tensor) -> None:
    warn(
        f"bmt.distributed.all_gather ({place}) passes back the gradient of this rank's part alone. For a loss over "
        "the rows of all ranks use bmt.gather_batch, whose gradient is whole, or multiply the loss by "
        "bmt.world_size() (if that is done, all is right).",
        stacklevel=2,
    )


def all_reduce(x: torch.Tensor, op: ReduceOp = "sum", comm: Communicator | None = None) -> torch.Tensor:
    """``x`` reduced over ranks, as a new tensor of the same shape on every rank.

    Backward, without communication: "sum" passes the gradient on as it is.  That is right for a loss computed alike
    on every rank from the result.  A loss that differs between ranks needs the sum of the ranks' gradients instead,
    of which sharded parameters form the mean when they reduce their own.  "avg" divides by the number of ranks; "max"
    and "min" keep the gradient where this rank's ``x`` is the result; "prod" multiplies by the product of the other
    ranks' ``x``.
    """
    reduced = ops.all_reduce(x, op, comm or _world_for(x))
    becomes_mean = comm is None and context().gradient_divisor > 1 and op in ("sum", "avg")
    if becomes_mean and reduced.requires_grad and context().rank == 0:
        reduced.register_hook(partial(_say_what_is_passed_on, op, users_line()))  # type: ignore[no-untyped-call]
    return reduced


def _say_what_is_passed_on(op: ReduceOp, place: str, _: torch.Tensor) -> None:
    warn(
        f'bmt.distributed.all_reduce(x, "{op}") ({place}) passes back the gradient as if parameters took the sum of '
        "the ranks' gradients, and they take the mean. For a loss of what all ranks have, bmt.mean(values) passes "
        "back what it needs; else multiply the loss by bmt.world_size() (if that is done, all is right).",
        stacklevel=2,
    )


def reduce_scatter(x: torch.Tensor, op: ReduceOp = "sum", comm: Communicator | None = None) -> torch.Tensor:
    """``x`` reduced over ranks; this rank gets its part of dimension 0, which the number of ranks must divide.

    Backward: the ranks' gradients, gathered, and treated as by ``all_reduce``.
    """
    return ops.reduce_scatter(x, op, comm or _world_for(x))


def broadcast(src: torch.Tensor, root: int, comm: Communicator | None = None) -> torch.Tensor:
    """``root``'s ``src`` on every rank, as a new tensor; ``src`` has the same shape and dtype everywhere.

    Backward: the sum of all ranks' gradients, on every rank.
    """
    return ops.broadcast(src, root, comm or _world_for(src))


def send_activations(hidden_state: torch.Tensor, next_rank: int, comm: Communicator | None = None) -> None:
    """Send a tensor to ``next_rank``, which calls ``recv_activations``.  No gradient flows back."""
    ops.send_activations(hidden_state, next_rank, comm or context().world)


def recv_activations(prev_rank: int, comm: Communicator | None = None) -> torch.Tensor:
    """The tensor that ``prev_rank`` sends with ``send_activations``, on this rank's compute device."""
    return ops.recv_activations(prev_rank, comm or context().world, context().device.torch_device)


def _world_for(x: torch.Tensor) -> Communicator:
    here = context()
    return here.world if x.device.type == here.device.torch_device.type else here.control
