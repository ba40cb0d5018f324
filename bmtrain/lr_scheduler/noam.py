"""Inverse square root decay."""

from __future__ import annotations

import math

from .warmup import WarmupLRScheduler


class Noam(WarmupLRScheduler):
    """``start_lr / sqrt(num_iter)`` after the warm-up, which therefore peaks at ``start_lr / sqrt(warmup_iter)``.

    Without warm-up, step 0 gets what step 1 gets: ``start_lr``.
    """

    def get_lr_warmup(self, num_iter: int) -> float:
        return self.start_lr / math.sqrt(self.warmup_iter) * num_iter / self.warmup_iter

    def get_lr_decay(self, num_iter: int) -> float:
        return self.start_lr / math.sqrt(max(num_iter, 1))
