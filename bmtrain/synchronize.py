"""Waiting for each other, and small results over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import overload

import torch

from . import distributed
from .comm import Communicator
from .context import context, is_initialized, synchronize

__all__ = ["agree", "gather_result", "rank_0_first", "sum_loss", "synchronize", "wait_loader"]


def agree(test: object) -> bool:
    """Rank 0's answer to a test, on every rank: ``if bmt.agree(os.path.exists(path)):``.  Collective.

    For tests of the clock, of files, of random numbers and of other values that ranks may see differently, where they
    decide about what all ranks must do. Every rank evaluates ``test``; a tensor must have one element.
    """
    if not is_initialized() or context().world_size == 1:
        return bool(test)
    control = context().control
    answer = torch.tensor([bool(test) if control.rank == 0 else False], dtype=torch.uint8, device="cpu")
    control.broadcast(answer, 0)
    return bool(answer)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the block, then all others do: ``with bmt.rank_0_first():`` around what fills a cache.  Collective.

    Nothing in the block may wait for other ranks.
    """
    waits = is_initialized() and context().world_size > 1
    if waits and context().rank > 0:
        synchronize()
    yield
    if waits and context().rank == 0:
        synchronize()


@overload
def sum_loss(
    loss: torch.Tensor, comm: Communicator | None = None, *, count: float | torch.Tensor | None = None
) -> torch.Tensor: ...


@overload
def sum_loss(loss: float, comm: Communicator | None = None, *, count: float | torch.Tensor | None = None) -> float: ...


def sum_loss(
    loss: torch.Tensor | float, comm: Communicator | None = None, *, count: float | torch.Tensor | None = None
) -> torch.Tensor | float:
    """The *average* of ``loss`` over ranks (its name is older than its meaning), of a number a number.  Collective.

    Args:
        count: of how many samples (or tokens) this rank's ``loss`` is the mean; where ranks differ, the average is that
            of all samples. None weighs all ranks alike.
    """
    if count is not None:
        if not isinstance(loss, torch.Tensor):
            return float(sum_loss(_number(loss), comm, count=count))
        weight = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
        weighted = torch.where(weight == 0, 0.0, loss.double() * weight)  # the mean of nothing is NaN
        total, weights = (distributed.all_reduce(x.contiguous(), "sum", comm) for x in (weighted, weight))
        return (total / weights).to(loss.dtype)
    if not isinstance(loss, torch.Tensor):
        return distributed.all_reduce(_number(loss), "avg", comm).item()
    return distributed.all_reduce(loss, "avg", comm)


def _number(loss: float) -> torch.Tensor:
    return torch.tensor(loss, dtype=torch.float64, device=context().device.torch_device)


def gather_result(result: torch.Tensor) -> torch.Tensor:
    """All ranks' ``result`` one after the other along dimension 0, on every rank and on the device of the argument.

    Tensor-parallel ranks, which see the same data, count once.
    Shapes may differ in dimension 0 only; a scalar counts as one row.  Any strides; no gradient.  Collective.
    """
    rows = result.detach().reshape(1) if result.dim() == 0 else result.detach()
    counts = [
        int(count) for count in distributed.all_gather(torch.tensor(rows.shape[0], device="cpu"), context().control)
    ]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    gathered = distributed.all_gather(padded)
    return torch.cat([gathered[rank][: counts[rank]] for rank in context().topology.data_ranks])


def wait_loader() -> None:
    """Does nothing: blocks wait for their own parameters.  Here for scripts that call it."""
