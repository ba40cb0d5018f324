"""Optimizers on shards, and the manager that drives a step."""

from .adam import AdamOffloadOptimizer, AdamOptimizer
from .interrupts import interrupted_together
from .manager import OptimManager
from .old import clip_grad_norm

__all__ = ["AdamOffloadOptimizer", "AdamOptimizer", "OptimManager", "clip_grad_norm", "interrupted_together"]
