"""What BMTRAIN_METER asks for: the steps of a script, measured without a line in it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..context import Context
from ..log import say
from ..meter import Interval, Report, append, flops_of
from .summary import first_tensor

_EACH = 10  # so many steps are told of one by one, for runs that are short; then every so many


class StepMeter:
    """Appends to ``path`` what steps took: each of the first ten, then every tenth.

    A step is a call of ``OptimManager.step``, or of an optimizer's own where no manager drives it.  What a rank trains
    on is told by what the model's forwards in training got first, of several models by that which got most: integers of
    two dimensions are tokens, of anything else rows are samples.

    Reports are made by all ranks together, after the same steps, for the mean of their losses.
    """

    def __init__(self, ctx: Context, path: Path) -> None:
        self._ctx, self._path = ctx, path
        self._interval = Interval(ctx)
        self._steps, self._inside, self._writes = 0, 0, ctx.rank == 0
        self._losses: list[torch.Tensor] = []
        self._norms: list[tuple[torch.Tensor, float]] = []
        self._given: weakref.WeakKeyDictionary[nn.Module, _Given] = weakref.WeakKeyDictionary()
        if self._writes:
            say(f"what steps take is written to {path}; bmt plot draws it")

    def note_forward(self, module: nn.Module, given: object) -> None:
        """A forward of ``module`` begins with the arguments ``given``."""
        batch = first_tensor(given)
        if batch is None:
            return
        found = self._given.get(module)
        if found is None:
            found = self._given[module] = _Given(module)
        found.add(batch)

    @property
    def _reports(self) -> bool:
        """Whether the step that is made now will be told of."""
        return self._steps < _EACH or (self._steps + 1) % _EACH == 0

    def note_loss(self, loss: torch.Tensor) -> None:
        """Gradients of ``loss`` are to be computed, and added to those of the step."""
        if self._reports:
            self._losses.append(loss.detach().sum() if loss.dim() else loss.detach())

    def note_norm(self, norm: torch.Tensor, norm_type: float) -> None:
        """As ``shard.engine`` says; of several, which are of different parameters, the norm of all is told."""
        if self._reports:
            self._norms.append((norm, norm_type))

    @contextmanager
    def managed_step(self, loss_scale: torch.Tensor | None) -> Iterator[None]:
        """As ``shard.engine`` says."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
        self._step(loss_scale)

    def optimizer_stepped(self) -> None:
        """An optimizer has updated its parameters."""
        if not self._inside:
            self._step(None)

    def _step(self, loss_scale: torch.Tensor | None) -> None:
        reports = self._reports
        self._steps += 1
        self._interval.count()
        if not reports:
            return
        loss, norm = self._mean_loss(), self._norm()
        most = max(self._given.values(), key=lambda given: given.count, default=_NOTHING)
        report = self._interval.read(self._steps, *most.speed(self._ctx.world_size // self._ctx.topology.data_size))
        scale = None if loss_scale is None else float(loss_scale)
        values = {"loss": loss, "gradient_norm": norm, "loss_scale": scale}
        if self._writes:
            self._write(report | {name: value for name, value in values.items() if value is not None})
        self._losses, self._norms = [], []
        self._given.clear()
        self._interval.begin()

    def _mean_loss(self) -> float | None:
        """Over the ranks that have one.  Collective."""
        total = torch.tensor([sum(map(float, self._losses)), bool(self._losses)], dtype=torch.float64, device="cpu")
        self._ctx.control.all_reduce(total, "sum")
        loss, ranks = total.tolist()
        return loss / ranks if ranks else None

    def _norm(self) -> float | None:
        types = {norm_type for _, norm_type in self._norms}
        if len(types) != 1:
            return None
        norms = torch.tensor([float(norm) for norm, _ in self._norms], dtype=torch.float64, device="cpu")
        return float(torch.linalg.vector_norm(norms, types.pop()))

    def _write(self, report: Report) -> None:
        try:
            append(self._path, report)
        except OSError as error:  # no reason to end a job
            self._writes = False
            say(f"{self._path} cannot be written any more, so nothing is: {error.strerror or error}")


class _Given:
    """What the forwards of one module got."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._rows, self._tokens, self._are_tokens = 0, 0, True

    def add(self, batch: torch.Tensor) -> None:
        """One more."""
        self._are_tokens &= batch.dim() == 2 and batch.dtype in (torch.int64, torch.int32)
        self._rows += batch.shape[0]
        self._tokens += batch.numel()

    @property
    def count(self) -> int:
        """Tokens, or samples."""
        return self._tokens if self._are_tokens else self._rows

    def speed(self, ranks: int) -> tuple[str, float | None, float | None]:
        """For ``Interval.read``; ``ranks`` get the same batches."""
        module = None if self._module is None else self._module()
        if module is None:
            return "tokens_per_second", None, None
        if not self._are_tokens:
            return "samples_per_second", self.count / ranks, None
        return "tokens_per_second", self.count / ranks, float(self.count * flops_of(module))


_NOTHING = _Given()
