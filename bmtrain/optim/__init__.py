"""Optimizers on shards, and the manager that drives a step."""

from .adam import AdamOffloadOptimizer, AdamOptimizer
from .interrupts import interrupted_together
from .manager import OptimManager
from .native_scaler import NativeScaler
from .old import clip_grad_norm

__all__ = [
    "AdamOffloadOptimizer", "AdamOptimizer", "NativeScaler", "OptimManager", "clip_grad_norm", "interrupted_together",
]  # fmt: skip
