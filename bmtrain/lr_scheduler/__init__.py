"""Learning rates as functions of the step number.

All start with a linear warm-up from 0 over ``warmup_iter`` steps, and differ in what follows.
"""

from .cosine import Cosine
from .exponential import Exponential
from .linear import Linear
from .no_decay import NoDecay
from .noam import Noam
from .warmup import WarmupLRScheduler

__all__ = ["Cosine", "Exponential", "Linear", "NoDecay", "Noam", "WarmupLRScheduler"]
