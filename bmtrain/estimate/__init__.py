"""How much memory a job will need, found out on a CPU without any values: ``python -m bmtrain estimate``."""

from .estimate import Estimate, Job, estimate

__all__ = ["Estimate", "Job", "estimate"]
