"""Exponential decay."""

from __future__ import annotations

from typing import Any

import torch

from .warmup import WarmupLRScheduler


class Exponential(WarmupLRScheduler):
    """Multiplies the rate by ``gamma`` at every step after the warm-up."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start_lr: float,
        warmup_iter: int,
        end_iter: int,
        num_iter: int = 0,
        gamma: float = 0.95,
    ) -> None:
        self.gamma = gamma  # before the base class asks for the first rate
        super().__init__(optimizer, start_lr, warmup_iter, end_iter, num_iter)

    def get_lr_decay(self, num_iter: int) -> float:
        return max(0.0, self.start_lr * self.gamma ** (num_iter - self.warmup_iter))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"gamma": self.gamma}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gamma = state_dict.get("gamma", self.gamma)  # older checkpoints do not have it
        super().load_state_dict(state_dict)
