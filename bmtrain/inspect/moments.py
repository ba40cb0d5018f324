"""Mean, deviation and range of values that are spread over ranks, exactly as if they were in one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """What is known of ``count`` values; NaN where it is undefined (the deviation of fewer than two)."""

    count: float = 0.0
    mean: float = math.nan
    squares: float = math.nan
    """Sum of squared differences from the mean."""
    max: float = math.nan
    min: float = math.nan

    @staticmethod
    def of(values: torch.Tensor | None) -> Moments:
        """The moments of one tensor; of nothing for None."""
        if values is None or values.numel() == 0:
            return Moments()
        wide = values.detach().double()
        mean = wide.mean()
        parts = torch.stack([mean, (wide - mean).square_().sum(), wide.max(), wide.min()]).tolist()
        return Moments(float(values.numel()), *parts)

    @staticmethod
    def together(parts: list[Moments]) -> Moments:
        """The moments of all parts' values."""
        parts = [part for part in parts if part.count]
        if not parts:
            return Moments()
        count = sum(part.count for part in parts)
        mean = sum(part.count * part.mean for part in parts) / count
        squares = sum(part.squares + part.count * (part.mean - mean) ** 2 for part in parts)
        return Moments(count, mean, squares, max(part.max for part in parts), min(part.min for part in parts))

    @property
    def std(self) -> float:
        """The unbiased standard deviation, as ``Tensor.std``."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan

    def row(self) -> list[float]:
        """All five numbers, for sending."""
        return [self.count, self.mean, self.squares, self.max, self.min]
