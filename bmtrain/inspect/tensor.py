"""Statistics of intermediate results and their gradients.

``record_tensor`` calls stay in the model's code and do nothing until somebody looks:

    with bmt.inspect.inspect_tensor() as inspector:
        loss = model(batch)
        optim_manager.backward(loss)
    bmt.print_rank(bmt.inspect.format_summary(inspector.get_summary()))
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import torch

from .. import debug
from ..autograd import backward_id
from ..context import context, world_size
from ..errors import RankDivergenceError, ShardedAccessError
from .moments import Moments

_ACTIVE = "_inspect_tensor"  # the InspectTensor that records now, in ``debug``


class InspectTensor:
    """What was recorded inside one ``inspect_tensor()``."""

    def __init__(self) -> None:
        self.summary: list[dict[str, Any]] = []
        """One dict for each record, among them its ``tensor``; complete when the ``with`` has ended."""
        self._outer: InspectTensor | None = None

    def __enter__(self) -> InspectTensor:
        self._outer = debug.get(_ACTIVE)
        debug.set(_ACTIVE, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        debug.set(_ACTIVE, self._outer)
        self._outer = None
        _number(self.summary)

    def get_summary(self) -> list[dict[str, Any]]:
        """Statistics over all ranks' values, in order of recording.  Collective; call it after the ``with``.

        Each dict has the ``name``, the ``shape`` (dimension 0 counted over all ranks), ``min``, ``max``, ``mean``,
        ``std``, ``grad_mean`` and ``grad_std``; the last two are None without gradient.
        Raises RankDivergenceError when ranks have recorded different numbers of tensors.
        """
        local = [row for entry in self.summary for row in _rows(entry["tensor"])]
        rows = _gather(torch.tensor(local, dtype=torch.float64, device="cpu").view(-1, 5))
        moments = [Moments.together([Moments(*part) for part in parts]) for parts in rows.transpose(0, 1).tolist()]
        result = []
        for index, entry in enumerate(self.summary):
            values, grad = moments[2 * index], moments[2 * index + 1]
            entry |= {"min": values.min, "max": values.max, "mean": values.mean, "std": values.std}
            entry |= {"grad_mean": grad.mean if grad.count else None, "grad_std": grad.std if grad.count else None}
            result.append(
                {key: value for key, value in entry.items() if key not in ("tensor", "group", "requires_grad")}
            )
        return result

    def get_tensor(self, name: str, group: str | None = None, index: int | None = None) -> torch.Tensor | None:
        """The tensor recorded under ``name`` (and ``group``), the ``index``-th of several; None if there is none."""
        prefix = "" if group is None else f"{group}."
        wanted = (f"{prefix}{name}", f"{prefix}0.{name}") if index is None else (f"{prefix}{index}.{name}",)
        for entry in self.summary:
            if entry["name"] in wanted:
                found: torch.Tensor = entry["tensor"]
                return found
        return None


def inspect_tensor() -> InspectTensor:
    """Records, inside ``with inspect_tensor() as inspector:``, what ``record_tensor`` is given."""
    return InspectTensor()


def record_tensor(x: torch.Tensor, name: str, group: str | None = None, requires_grad: bool = True) -> None:
    """Keep ``x`` for ``inspect_tensor``; does nothing when nobody inspects.

    Args:
        x: an intermediate result, not a parameter.  It is kept alive until the inspector goes.
        name, group: how the summary names it: ``group.name``, or ``group.0.name``, ``group.1.name``... if there are
        several. requires_grad: keep its gradient too.

    Raises ShardedAccessError for a parameter; ``inspect_model`` is for those.
    """
    if isinstance(x, torch.nn.Parameter):
        raise ShardedAccessError(
            "record_tensor() is for intermediate results; use bmt.inspect.inspect_model() for parameters."
        )
    inspector: InspectTensor | None = debug.get(_ACTIVE)
    if inspector is None or backward_id() is not None:  # a forward repeated during backward is no news
        return
    keeps_grad = requires_grad and x.requires_grad
    if keeps_grad:
        x.retain_grad()
    shape = (x.shape[0] * world_size(), *x.shape[1:]) if x.dim() else ()
    record: dict[str, Any] = {"name": name, "group": group, "requires_grad": keeps_grad, "shape": shape, "tensor": x}
    inspector.summary.append(record | dict.fromkeys(("min", "max", "mean", "std", "grad_mean", "grad_std")))


def _number(summary: list[dict[str, Any]]) -> None:
    total = Counter((entry["group"], entry["name"]) for entry in summary)
    seen: Counter[tuple[Any, str]] = Counter()
    for entry in summary:
        key = (entry["group"], entry["name"])
        parts = [entry["group"], seen[key] if total[key] > 1 else None, entry["name"]]
        entry["name"] = ".".join(str(part) for part in parts if part is not None)
        seen[key] += 1


def _rows(tensor: torch.Tensor) -> list[list[float]]:
    grad = tensor.grad if tensor.requires_grad and (tensor.retains_grad or tensor.is_leaf) else None
    if grad is not None:  # of this rank's loss, of which the gradients of all ranks are averaged
        grad = grad / context().gradient_divisor
    return [Moments.of(tensor).row(), Moments.of(grad).row()]


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Every rank's rows: (world_size, rows, 5)."""
    control = context().control
    counts = torch.empty(control.world_size, dtype=torch.int64, device="cpu")
    control.all_gather(torch.tensor([rows.shape[0] // 2], device="cpu"), counts)
    if len(set(counts.tolist())) > 1:
        raise RankDivergenceError(f"The ranks recorded different numbers of tensors: {counts.tolist()}, rank by rank.")
    whole = torch.empty((control.world_size, *rows.shape), dtype=rows.dtype, device="cpu")
    control.all_gather(rows, whole)
    return whole
