"""Whether a step's losses and gradients are finite, asked beside what the step does anyway.

The norm of clipping tells of its gradients, on all ranks, and takes each rank's losses along.  What was not clipped is
summed, in one pass over this rank's gradients.  A GPU tells the host later, when the next step is on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..context import Context
from ..shard.engine import Run
from .loss_scale import Overflow
from .pieces import homes_of

OnNonFinite = Literal["stop", "skip", "dump", "ignore"]


class NonFinite(Overflow):
    """Whether a sum, equal on all ranks, is infinite or NaN."""

    def __init__(self, ctx: Context, total: torch.Tensor) -> None:
        self._total = total
        self._flag: torch.Tensor | None = None
        self._value = ctx.device.read_later(total)

    @property
    def flag(self) -> torch.Tensor:  # type: ignore[override]
        if self._flag is None:
            self._flag = (~torch.isfinite(self._total)).float()
        return self._flag

    @property
    def happened(self) -> bool:
        return not math.isfinite(self._value.get())


class StepFacts:
    """What one step is judged by.

    Attributes:
        losses: of its backwards, 0-d, on whatever device.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.losses: list[torch.Tensor] = []
        self._norms: dict[tuple[int, int], torch.Tensor] = {}  # by the first of so many parameters
        self._told = 0  # losses that some norm has taken along

    def forget(self) -> None:
        """The gradients are gone."""
        if self.losses or self._norms:
            self.losses, self._norms, self._told = [], {}, 0

    def note_loss(self, loss: torch.Tensor) -> None:
        """A backward from ``loss`` begins."""
        self.losses.append(loss.detach().sum() if loss.dim() else loss.detach())

    def spoils(self) -> torch.Tensor | None:
        """0-d float64 on the device: 0, or NaN if a loss is not finite; None without a loss."""
        if not self.losses:
            return None
        total = self.losses[0].to(self._ctx.device.torch_device, torch.float64)
        for loss in self.losses[1:]:
            total = total + loss.to(total.device)
        return total * 0

    def note_norm(self, params: Sequence[Any], norm: torch.Tensor) -> None:
        """``norm``, equal on all ranks, of the gradients of ``params``, with ``spoils()`` of every rank."""
        if params:
            self._norms[id(params[0]), len(params)] = norm
            self._told = len(self.losses)

    def outcome(self, params: Callable[[], list[Any]], count: int) -> NonFinite:
        """Whether the step of ``params``, ``count`` of them, is to be made.  Collective unless a norm has told."""
        ctx = self._ctx
        norms = list(self._norms.values())
        everyone = ctx.model_group.world_size == ctx.world_size
        if everyone and self._told == len(self.losses) and sum(n for _, n in self._norms) >= count:
            return NonFinite(ctx, norms[0] if len(norms) == 1 else torch.stack(norms).sum())
        total = torch.zeros((), dtype=torch.float64, device=ctx.device.torch_device)
        for home in homes_of(params()):
            if home.gradient.present:
                grad = home.gradient.values()[0].detach()
                grad = torch.view_as_real(grad) if grad.is_complex() else grad
                total += grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)).to(total.device)
        for known in (*norms, self.spoils()):  # a pending factor of clipping is in no sum
            if known is not None:
                total += known.to(total.device)
        total.mul_(0)
        # With fewer elements than ranks gloo lets some wait for others alone, which would learn late of what is wrong.
        shared = total.repeat(ctx.world_size)
        ctx.world.all_reduce(shared, "sum")
        return NonFinite(ctx, shared[0])


@dataclass(frozen=True, eq=False)
class Pending:
    """A step, and what can say why it is not finite."""

    number: int
    outcome: NonFinite
    losses: list[torch.Tensor]
    runs: list[Run]
    is_made: bool = False
    """Whether parameters have changed all the same."""
