"""A constant rate."""

from __future__ import annotations

from .warmup import WarmupLRScheduler


class NoDecay(WarmupLRScheduler):
    """Stays at ``start_lr`` after the warm-up."""

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr
