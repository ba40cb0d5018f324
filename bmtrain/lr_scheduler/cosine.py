"""Half a cosine."""

from __future__ import annotations

import math

from .warmup import WarmupLRScheduler


class Cosine(WarmupLRScheduler):
    """Falls along half a cosine from ``start_lr`` at ``warmup_iter`` to 0 at ``end_iter``.

    Steps past ``end_iter`` go on along the cosine, so the rate rises again: stop training at ``end_iter``.
    """

    def get_lr_decay(self, num_iter: int) -> float:
        progress = (num_iter - self.warmup_iter) / max(1, self.end_iter - self.warmup_iter)
        return max(0.0, self.start_lr * 0.5 * (1.0 + math.cos(progress * math.pi)))
