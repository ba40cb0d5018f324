"""Linear decay."""

from __future__ import annotations

from .warmup import WarmupLRScheduler


class Linear(WarmupLRScheduler):
    """Falls on a straight line from ``start_lr`` at ``warmup_iter`` to 0 at ``end_iter``, and stays 0."""

    def get_lr_decay(self, num_iter: int) -> float:
        if num_iter >= self.end_iter:
            return 0.0
        return self.start_lr * (self.end_iter - num_iter) / (self.end_iter - self.warmup_iter)
