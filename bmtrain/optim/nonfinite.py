"""Whether a step's losses and gradients are finite, and no spike, asked beside what the step does anyway.

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
from ..errors import ConfigurationError
from ..shard.engine import LatestRuns
from .loss_scale import Overflow
from .pieces import homes_of

OnNonFinite = Literal["stop", "skip", "dump", "ignore"]


_NORMS, _FEWEST = 64, 16
"""Of how many steps norms are remembered, and from how many on they say what is usual."""


class NonFinite(Overflow):
    """Whether a sum, equal on all ranks, is infinite or NaN, or negative: a spike of that size."""

    def __init__(self, ctx: Context, total: torch.Tensor) -> None:
        self._total = total
        self._flag: torch.Tensor | None = None
        self._value = ctx.device.read_later(total)

    @property
    def flag(self) -> torch.Tensor:  # type: ignore[override]
        if self._flag is None:
            self._flag = (~(torch.isfinite(self._total) & (self._total >= 0))).float()
        return self._flag

    @property
    def happened(self) -> bool:
        return not (math.isfinite(self._value.get()) and self._value.get() >= 0)

    @property
    def spike(self) -> float | None:
        """The norm that is too large for a step like those before; waits for the device."""
        value = self._value.get()
        return -value if math.isfinite(value) and value < 0 else None


class Spikes:
    """Norms of the last steps, on the device, and what is too much beside them.

    Args:
        most: times their median.
    """

    def __init__(self, ctx: Context, most: float) -> None:
        self.most, self._count = most, 0
        self._last = torch.full((_NORMS,), math.nan, dtype=torch.float64, device=ctx.device.torch_device)

    def judged(self, norm: torch.Tensor) -> torch.Tensor:
        """0-d: ``norm``; negative if it is a spike."""
        norm = norm.to(self._last)
        limit = self._last.nanmedian() * self.most
        is_spike = (norm > limit) & (self._last.isfinite().sum() >= _FEWEST)
        # A spike counts, too: what comes again and again becomes usual.
        self._last[self._count % _NORMS] = torch.where(norm.isfinite(), norm, math.nan)
        self._count += 1
        return torch.where(is_spike, -norm, norm)

    def words(self, norm: float) -> str:
        """What is said of a spike."""
        return f"the norm of its gradients is {norm:.4g}, more than {self.most:g} times the median of the last steps"


class StepFacts:
    """What one step is judged by.

    Attributes:
        losses: of its backwards, 0-d, on whatever device.
        spikes: None where no norm is too large.
    """

    def __init__(self, ctx: Context, spike: float | None = None) -> None:
        self._ctx = ctx
        self.spikes = None if spike is None else Spikes(ctx, spike)
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
        if self.spikes is not None:
            if not norms:
                raise ConfigurationError(
                    "OptimManager(spike=) judges steps by what clip_grad_norm says. Call it before step(); with "
                    "max_norm=float('inf') it changes no gradient."
                )
            norms = [self.spikes.judged(norms[0] if len(norms) == 1 else torch.stack(norms).sum())]
        everyone = ctx.model_group.world_size == ctx.world_size
        if everyone and self._told == len(self.losses) and sum(n for _, n in self._norms) >= count:
            return NonFinite(ctx, norms[0] if len(norms) == 1 else torch.stack(norms).sum())
        own_norm = norms.pop() if self.spikes is not None else None
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
        return NonFinite(ctx, shared[0] if own_norm is None else shared[0] + own_norm)


@dataclass(frozen=True, eq=False)
class Pending:
    """A step, and what can say why it is not finite."""

    number: int
    outcome: NonFinite
    losses: list[torch.Tensor]
    runs: LatestRuns
    is_made: bool = False
    """Whether parameters have changed all the same."""
    spikes: Spikes | None = None
    """What has judged it, beside whether it is finite."""
