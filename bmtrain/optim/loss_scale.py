"""A loss scale that follows overflows on the device, so that no step waits for it.

The device decides at once whether a step counts: optimizers get a flag, and the next loss is multiplied by the scale as
it will be.  The host is told later.  What it keeps itself (learning-rate schedules, numbers of steps) goes on as if
there had been no overflow, and is put back when one becomes known: at the latest before the next step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..context import Context


class Overflow:
    """Whether some rank's gradient was infinite or NaN.

    Attributes:
        flag: 0-d float32 on the device, 0 or 1, equal on all ranks.
    """

    def __init__(self, ctx: Context, flag: torch.Tensor) -> None:
        self.flag = flag
        self._value = ctx.device.read_later(flag)

    @property
    def is_known(self) -> bool:
        """Whether ``happened`` is to be asked at once; decided alike on all ranks, though some may have it earlier."""
        return not self._value.comes_later

    @property
    def happened(self) -> bool:
        """The answer on the host; waits for the device."""
        return self._value.get() != 0


class LossScale:
    """The scale and the number of good steps since it last changed, both on the device.

    Attributes:
        value: 0-d float64.
    """

    def __init__(self, ctx: Context, value: float, good_steps: int = 0) -> None:
        device = ctx.device.torch_device
        self.value = torch.tensor(float(value), dtype=torch.float64, device=device)
        self._good_steps = torch.tensor(good_steps, device=device)

    @property
    def good_steps(self) -> int:
        """Waits for the device."""
        return int(self._good_steps)

    def follow(self, overflow: Overflow, factor: float, interval: int, least: float, most: float) -> None:
        """Divide by ``factor`` after an overflow; multiply by it after ``interval`` steps without one."""
        bad = overflow.flag != 0
        steps = self._good_steps + 1
        changed = bad | (steps >= interval)
        wanted = torch.where(bad, self.value / factor, self.value * factor).clamp(least, most)
        self.value.copy_(torch.where(changed, wanted, self.value))
        self._good_steps.copy_(steps.masked_fill(changed, 0))


class Unscale:
    """The inverse of a loss scale: a number on the host, or one on the device joined with other factors there."""

    def __init__(self, scale: float | torch.Tensor) -> None:
        self._inverse: torch.Tensor | None = None
        if isinstance(scale, torch.Tensor):
            self.on_host, self._inverse = 1.0, (1.0 / scale).float()
        else:
            self.on_host = 1.0 / scale
        self._joined: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def with_factor(self, factor: torch.Tensor | None) -> torch.Tensor | None:
        """What to multiply a gradient by that has this pending factor, beside ``on_host``."""
        if self._inverse is None or factor is None:
            return factor if self._inverse is None else self._inverse
        if id(factor) not in self._joined:  # clipping gives all gradients the same one
            self._joined[id(factor)] = (factor, factor * self._inverse)
        return self._joined[id(factor)][1]


class ScheduleStep:
    """One step of a learning-rate schedule that can be taken back."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self._groups, self._schedule = optimizer.param_groups, schedule
        before = [_options(group) for group in self._groups]
        self._state = copy.deepcopy(schedule.state_dict())
        schedule.step()
        after = [_options(group) for group in self._groups]
        self._changes = [
            {k: (b[k], a[k]) for k in a if k in b and a[k] is not b[k]} for b, a in zip(before, after, strict=True)
        ]

    @staticmethod
    def can_be_undone(schedule: Any) -> bool:
        """Whether ``schedule`` tells its state and takes one back."""
        return hasattr(schedule, "state_dict") and hasattr(schedule, "load_state_dict")

    def undo(self) -> None:
        """As if the schedule had not stepped; what was set by hand since then stays."""
        present = [_options(group) for group in self._groups]
        self._schedule.load_state_dict(self._state)
        for group, now, changes in zip(self._groups, present, self._changes, strict=True):
            group.update(now)
            group.update({k: before for k, (before, after) in changes.items() if now[k] is after})


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params"}
