"""How fast a job trains and what it needs, as numbers of every so many steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .context import context
from .errors import ConfigurationError


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
        matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)
        self.flops_per_token = 6 * matrices if flops_per_token is None else flops_per_token
        self.every, self.path = every, None if path is None else Path(path)
        self._writers = [_writing(writer) for writer in writers if writer is not None]
        self.steps = 0
        self._ctx = context()
        self._peak = self._ctx.device.peak_flops()
        self._ctx.device.waits.is_on = True
        self._knows_waits = self._ctx.watchdog is not None or self._ctx.world_size == 1
        self._begin()

    def _begin(self) -> None:
        self._tokens, self._waited, self._since = 0, self._ctx.device.waits.seconds(), time.perf_counter()

    def step(self, tokens: int, **values: float | torch.Tensor) -> dict[str, float | None] | None:
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
        self._tokens += tokens
        if self.steps % self.every:
            return None
        numbers = {
            name: float(value.detach() if isinstance(value, torch.Tensor) else value) for name, value in values.items()
        }
        self._ctx.device.synchronize()
        seconds = time.perf_counter() - self._since
        speed = self._tokens / seconds
        waited = (self._ctx.device.waits.seconds() - self._waited) / seconds if self._knows_waits else None
        memory = self._ctx.device.peak_memory() / 2**30 if self._ctx.device.measures_memory else None
        found: dict[str, float | None] = {
            "step": self.steps, "seconds": seconds / self.every, "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / self._peak if self._peak else None,
            "exposed_communication": waited, "peak_gib": memory, **numbers,
        }  # fmt: skip
        if self._ctx.rank == 0:
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            for write in self._writers:
                write(found)
        self._begin()
        return found


def _writing(writer: Any) -> Callable[[dict[str, float | None]], object]:
    """What tells a report to ``writer``."""

    def measured(report: dict[str, float | None]) -> dict[str, float]:
        return {name: value for name, value in report.items() if value is not None and name != "step"}

    if hasattr(writer, "add_scalar"):

        def add(report: dict[str, float | None]) -> None:
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
