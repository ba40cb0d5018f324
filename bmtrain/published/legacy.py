"""Calls that older scripts make and newer ones do otherwise."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch


class Steps(Protocol):
    """A schedule of learning rates."""

    def step(self) -> object:
        """Go on by one."""


def optim_step(optim: torch.optim.Optimizer, lr_scheduler: Steps | None = None) -> None:
    """``optim.step()`` and ``lr_scheduler.step()``.  Use ``bmt.optim.OptimManager``, which also scales losses."""
    warnings.warn("bmt.optim_step() is old; use bmt.optim.OptimManager.", DeprecationWarning, stacklevel=2)
    optim.step()
    if lr_scheduler is not None:
        lr_scheduler.step()
