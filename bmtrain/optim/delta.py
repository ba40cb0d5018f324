"""By how much a step changes parameters."""

from __future__ import annotations

import torch

from ..context import context
from ..shard.flat import FlatShard
from .pieces import Piece


class Delta:
    """Mean and variance, over all elements, of what one step has added to them."""

    def __init__(self) -> None:
        self._sum = self._squares = self._count = 0.0

    def add(self, piece: Piece, change: torch.Tensor) -> None:
        """``change`` (n,) is what was added to ``piece``; in its gaps, zeros."""
        if not isinstance(piece.flat, FlatShard) and context().rank > 0:
            return  # every rank has it whole
        wide = change.double()
        self._sum += float(wide.sum())
        self._squares += float(wide.square().sum())
        self._count += sum(piece.flat.local(piece.flat.shard, index).numel() for index in piece.indices)

    def of_all_ranks(self) -> None:
        """Add up what the ranks have.  Collective."""
        sums = torch.tensor([self._sum, self._squares, self._count], dtype=torch.float64, device="cpu")
        context().control.all_reduce(sums, "sum")
        self._sum, self._squares, self._count = sums.tolist()

    @property
    def mean(self) -> float:
        """0 where nothing was changed."""
        return self._sum / self._count if self._count else 0.0

    @property
    def variance(self) -> float:
        """Not corrected for the mean's being estimated."""
        return max(0.0, self._squares / self._count - self.mean**2) if self._count else 0.0
