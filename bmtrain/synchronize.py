"""Waiting for each other, and small results over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast, overload

import numpy
import torch

from . import distributed
from .comm import Communicator
from .context import context, is_initialized, synchronize
from .data import is_sharded
from .errors import ConfigurationError
from .objects import allgather_objects

__all__ = [
    "agree", "gather_result", "gather_samples", "rank_0_first", "sum_loss", "synchronize", "total", "wait_loader",
]  # fmt: skip
ValueT = TypeVar("ValueT")


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


@overload
def sum_loss(
    loss: numpy.ndarray, comm: Communicator | None = None, *, count: float | torch.Tensor | None = None
) -> numpy.ndarray: ...


@overload
def sum_loss(
    loss: dict[Any, Any], comm: Communicator | None = None, *, count: float | torch.Tensor | None = None
) -> dict[Any, Any]: ...


def sum_loss(
    loss: torch.Tensor | float | numpy.ndarray | dict[Any, Any],
    comm: Communicator | None = None,
    *,
    count: float | torch.Tensor | None = None,
) -> torch.Tensor | float | numpy.ndarray | dict[Any, Any]:
    """The *average* of ``loss`` over ranks (its name is older than its meaning), of a number a number.  Collective.

    Of a dict, as detectors give their losses, a dict with the average of each; of an array an array.

    Args:
        count: of how many samples (or tokens) this rank's ``loss`` is the mean; where ranks differ, the average is that
            of all samples. None weighs all ranks alike.
    """
    if isinstance(loss, dict):
        return {key: sum_loss(value, comm, count=count) for key, value in loss.items()}
    if isinstance(loss, numpy.ndarray) and loss.ndim:
        means = sum_loss(_number(loss), comm, count=count).cpu().numpy()
        return means.astype(loss.dtype) if loss.dtype.kind == "f" else means
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


def _number(loss: float | numpy.ndarray) -> torch.Tensor:
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


def total(value: ValueT, of: object = None) -> ValueT:
    """The sum over ranks of what each counted in its share of a batch: a number, an array or a tensor.  Collective.

        correct += bmt.total((out.argmax(1) == y).sum().item())

    Args:
        value: of the same kind, and shape, on every rank. No gradient flows back.
        of: the loader that the batch came from, where that may be one which all ranks go through whole
            (``loaders[part]``): then ``value`` is given back as it is.

    A sum of bools is an int.  Before ``init_distributed`` and on one rank ``value`` is given back.
    """
    if not _is_share(of):
        return value
    if isinstance(value, torch.Tensor):
        counted = value.detach()
        counted = counted.long() if counted.dtype == torch.bool else counted
        return cast(ValueT, _once(distributed.all_reduce(counted.contiguous(), "sum")))
    tensor = torch.as_tensor(value, dtype=torch.int64 if _is_whole(value) else torch.float64, device="cpu")
    summed = _once(distributed.all_reduce(tensor.contiguous(), "sum", context().control))
    return cast(ValueT, summed.numpy() if isinstance(value, numpy.ndarray) else summed.item())


def gather_samples(values: ValueT, of: object = None) -> ValueT:
    """What ranks have of their shares of a batch, in the order of the batch, on every rank.  Collective.

        predictions.extend(bmt.gather_samples(out.argmax(1).tolist()))

    Args:
        values: a tensor or array with a row for each sample, or a list or tuple of what can be sent (``wire``). A
            number and a 0-d tensor count as a mean over the share: the mean over the ranks is given.
        of: as in :func:`total`.

    Raises ConfigurationError, on every rank, where the rows of ranks have different shapes.
    """
    if not _is_share(of):
        return values
    if isinstance(values, list | tuple):
        return cast(ValueT, type(values)(_items_of_all(values)))
    if isinstance(values, numpy.ndarray) and values.ndim and values.dtype.kind not in "biufc":
        return cast(ValueT, numpy.array(_items_of_all(values.tolist())))
    if not isinstance(values, torch.Tensor | numpy.ndarray | numpy.generic | int | float):
        raise ConfigurationError(f"bmt.gather_samples takes tensors, arrays, lists and numbers, not {type(values)}.")
    rows = values.detach() if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")
    if rows.dim() == 0:
        mean = distributed.all_reduce(rows.double(), "avg", None if rows.is_cuda else context().control)
        return cast(ValueT, mean.to(rows.dtype) if isinstance(values, torch.Tensor) else mean.item())
    shapes = allgather_objects(list(rows.shape[1:]))
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigurationError(
            f"The ranks' rows have different shapes, {shapes}: pad them to one shape, or use lists."
        )
    gathered = gather_result(rows)
    return cast(ValueT, gathered.numpy() if isinstance(values, numpy.ndarray) else gathered)


def _items_of_all(items: Sequence[Any]) -> list[Any]:
    parts = allgather_objects(items)
    return [item for rank in context().topology.data_ranks for item in parts[rank]]


def _once(summed: torch.Tensor) -> torch.Tensor:
    """A sum over ranks in which tensor-parallel ranks, which see the same data, count once."""
    copies = context().world_size // context().topology.data_size
    if copies == 1:
        return summed
    return summed / copies if summed.is_floating_point() or summed.is_complex() else summed // copies


def _is_share(of: object) -> bool:
    """Whether a rank's batches from a loader are its share of larger ones."""
    if not is_initialized() or context().world_size == 1:
        return False
    return of is None or is_sharded(of)


def _is_whole(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(value, int) if dtype is None else dtype.kind in "biu"


def wait_loader() -> None:
    """Does nothing: blocks wait for their own parameters.  Here for scripts that call it."""
