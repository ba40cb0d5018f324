"""Optimizers on shards, and the manager that drives a step."""

from .adam import AdamOffloadOptimizer, AdamOptimizer
from .manager import OptimManager

__all__ = ["AdamOffloadOptimizer", "AdamOptimizer", "OptimManager"]
