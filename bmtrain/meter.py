"""How fast a job trains and what it needs, as numbers of every so many steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .context import Context, context
from .errors import ConfigurationError

Report = dict[str, float | None]


class Interval:
    """What some steps take: time, waiting, memory.  Runs from the time that it is made."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._knows_waits = ctx.watchdog is not None or ctx.world_size == 1
        ctx.device.waits.is_on = True
        self.begin()

    def begin(self) -> None:
        """From here on."""
        self._steps, self._waited, self._since = 0, self._ctx.device.waits.seconds(), time.perf_counter()

    def count(self) -> None:
        """One step is made."""
        self._steps += 1

    def read(self, step: int, speed: str, count: float | None, flops: float | None) -> Report:
        """What ``Meter.step`` returns of it but for ``values``; waits for the device.

        Args:
            step: the number of the last step.
            speed: the name of what is ``count``ed, a second.
            flops: that the model needed.
        """
        device = self._ctx.device
        device.synchronize()
        seconds = time.perf_counter() - self._since
        peak = device.peak_flops()
        return {
            "step": step, "seconds": seconds / self._steps, speed: None if count is None else count / seconds,
            "mfu": flops / seconds / peak if peak and flops is not None else None,
            "exposed_communication": (device.waits.seconds() - self._waited) / seconds if self._knows_waits else None,
            "peak_gib": device.peak_memory() / 2**30 if device.measures_memory else None,
        }  # fmt: skip


def flops_of(model: nn.Module) -> int:
    """Of forward and backward for one token: 6 for every element of a parameter with two dimensions or more."""
    return 6 * sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)


def append(path: Path, report: Report) -> None:
    """``report`` as the last line of ``path``."""
    with path.open("a") as file:
        file.write(json.dumps(report) + "\n")


class Meter:
    """Tokens per second, model FLOPs utilisation, memory, and what else is given, every ``every`` steps.

    Waits for the device when it reports, and never for other ranks: every rank measures itself, rank 0 writes::

        meter = bmt.Meter(model, path="run.jsonl")
        for batch in loader:
            ...
            optim_manager.step()
            meter.step(tokens=batch.numel(), loss=loss, gradient_norm=norm)

    Model FLOPs utilisation is ``tokens/s * flops_per_token / peak``: what the model needs, without what is recomputed,
    of what the GPU could do in bf16 or fp16 without sparsity.

    Exposed communication is the share of the time in which computation waited for other ranks: inside collectives on a
    CPU, where all of them are waited for; on a GPU while its stream stood still.  That holds the time that slower ranks
    take, and not what is moved beside computation.

    Args:
        model: of which parameters are counted.
        every: optimizer steps between two reports.  The first report holds what only first steps do.
        flops_per_token: of forward and backward; by default 6 for every element of a parameter with two dimensions or
            more, which leaves attention's own out (12 * layers * width * length for each token).
        path: a file to which rank 0 appends a line of json for each report; ``bmt plot`` draws it.
        writers: what rank 0 tells each report, too: a bar of tqdm (``set_postfix``), a ``SummaryWriter`` of TensorBoard
            (``add_scalar``), a run of wandb (``log``), or a function of the report. None among them is passed over, as
            where only rank 0 makes a writer.

    Raises ConfigurationError for ``every`` below 1, and for a writer of none of these kinds.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 10,
        flops_per_token: float | None = None,
        path: str | Path | None = None,
        writers: Sequence[object] = (),
    ) -> None:
        if every < 1:
            raise ConfigurationError(f"every must be at least 1, not {every}.")
        self.flops_per_token = flops_of(model) if flops_per_token is None else flops_per_token
        self.every, self.path = every, None if path is None else Path(path)
        self._writers = [_writing(writer) for writer in writers if writer is not None]
        self.steps = self._tokens = 0
        self._ctx = context()
        self._interval = Interval(self._ctx)

    def step(self, tokens: int, **values: float | torch.Tensor) -> Report | None:
        """Count an optimizer step; every ``every`` steps returns what was measured since the last report.

        Args:
            tokens: that this rank has trained on, of its share of the batch.
            values: numbers of this step to report with it; tensors of one element are read when that is done.

        Returns:
            ``step``, ``seconds`` a step, ``tokens_per_second`` of this GPU, ``mfu`` (None where the peak is not known),
            ``exposed_communication`` (between 0 and 1; None with ``BMTRAIN_WATCH=0``), ``peak_gib`` of memory (None on
            a CPU), and ``values``.
        """
        self.steps += 1
        self._interval.count()
        self._tokens += tokens
        if self.steps % self.every:
            return None
        numbers = {
            name: float(value.detach() if isinstance(value, torch.Tensor) else value) for name, value in values.items()
        }
        found = self._interval.read(self.steps, "tokens_per_second", self._tokens, self._tokens * self.flops_per_token)
        found |= numbers
        if self._ctx.rank == 0:
            if self.path is not None:
                append(self.path, found)
            for write in self._writers:
                write(found)
        self._tokens = 0
        self._interval.begin()
        return found


def _writing(writer: Any) -> Callable[[Report], object]:
    """What tells a report to ``writer``."""

    def measured(report: Report) -> dict[str, float]:
        return {name: value for name, value in report.items() if value is not None and name != "step"}

    if hasattr(writer, "add_scalar"):

        def add(report: Report) -> None:
            for name, value in measured(report).items():
                writer.add_scalar(name, value, report["step"])

        return add
    if hasattr(writer, "set_postfix"):
        return lambda report: writer.set_postfix(measured(report))
    if hasattr(writer, "log"):
        return lambda report: writer.log(measured(report), step=report["step"])
    if callable(writer):
        return writer  # type: ignore[no-any-return]
    raise ConfigurationError(
        f"A writer of bmt.Meter is a {type(writer).__name__}; give a tqdm bar, a SummaryWriter, a wandb run or a "
        "function."
    )
