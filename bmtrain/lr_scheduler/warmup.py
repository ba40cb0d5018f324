"""What all schedules share: counting steps, warming up, writing the rate into the optimizer, saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..errors import ConfigurationError


class WarmupLRScheduler(ABC):
    """Sets the learning rate of every parameter group from a step number, already on construction.

    Args:
        optimizer: its ``param_groups`` get the rate.
        start_lr: the rate at the end of the warm-up (for ``Noam``: that rate times sqrt(warmup_iter)).
        warmup_iter: steps over which the rate grows linearly from 0; 0 for no warm-up.
        end_iter: the step at which training ends; used by the schedules that decay towards an end.
        num_iter: the step to start from, for resuming.

    Raises ConfigurationError for a negative step number.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, start_lr: float, warmup_iter: int, end_iter: int, num_iter: int = 0
    ) -> None:
        self.optimizer = optimizer
        self.start_lr = start_lr
        self.warmup_iter = warmup_iter
        self.end_iter = end_iter
        self.num_iter = num_iter
        self._current_lr = 0.0
        self.step(num_iter)

    def get_lr_warmup(self, num_iter: int) -> float:
        """The rate at a step before the end of the warm-up."""
        return self.start_lr * num_iter / self.warmup_iter

    @abstractmethod
    def get_lr_decay(self, num_iter: int) -> float:
        """The rate at a step after the warm-up."""

    def get_lr(self) -> float:
        """The rate at the present step."""
        if self.num_iter < 0:
            raise ConfigurationError(
                f"The step number of a learning-rate schedule is {self.num_iter}; it must not be negative."
            )
        if self.num_iter < self.warmup_iter:
            return self.get_lr_warmup(self.num_iter)
        return self.get_lr_decay(self.num_iter)

    @property
    def current_lr(self) -> float:
        """The rate that the optimizer was given last."""
        return self._current_lr

    def step(self, num_iter: int | None = None) -> None:
        """Go to step ``num_iter``, or to the next one, and give the optimizer its rate."""
        self.num_iter = self.num_iter + 1 if num_iter is None else num_iter
        self._current_lr = self.get_lr()
        for group in self.optimizer.param_groups:
            group["lr"] = self._current_lr

    def state_dict(self) -> dict[str, Any]:
        """The numbers that describe the schedule and its present step."""
        return {
            "start_lr": self.start_lr,
            "warmup_iter": self.warmup_iter,
            "end_iter": self.end_iter,
            "num_iter": self.num_iter,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the optimizer gets that step's rate at once."""
        self.start_lr = state_dict["start_lr"]
        self.warmup_iter = state_dict["warmup_iter"]
        self.end_iter = state_dict["end_iter"]
        self.step(state_dict["num_iter"])
