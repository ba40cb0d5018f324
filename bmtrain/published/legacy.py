"""Calls that older scripts make and newer ones do otherwise."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def optim_step(optim: torch.optim.Optimizer, lr_scheduler: Any = None) -> None:
    """``optim.step()`` and ``lr_scheduler.step()``.  Use ``bmt.optim.OptimManager``, which also scales losses."""
    warnings.warn("bmt.optim_step() is old; use bmt.optim.OptimManager.", DeprecationWarning, stacklevel=2)
    optim.step()
    if lr_scheduler is not None:
        lr_scheduler.step()
