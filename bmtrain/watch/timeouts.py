"""How long ranks wait for each other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from ..errors import ConfigurationError


@dataclass(frozen=True)
class Timeouts:
    """How long a rank waits for the others before the job is ended.

    Slowness alone ends nothing before: it is reported after seconds.

    Attributes:
        start: until the first optimizer step; one rank may download data that all will use, or compile.
        step: from then on, in training and evaluation.
        save: while a rank that waits, or one that is waited for, is in bmt.save or bmt.save_checkpoint.

    Raises ConfigurationError unless all are longer than nothing.
    """

    start: timedelta = timedelta(minutes=30)
    step: timedelta = timedelta(minutes=30)
    save: timedelta = timedelta(minutes=30)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= timedelta(0):
                raise ConfigurationError(f"Timeouts.{name} must be longer than nothing, not {value}.")

    @property
    def longest(self) -> timedelta:
        """The longest of the three."""
        return max(self.start, self.step, self.save)
