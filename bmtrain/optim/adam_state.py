"""What AdamW keeps of each flat shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch

from ..shard.flat import FlatShard
from ..shard.fp32_values import can_split, join, part_of_joined, remainder_of, write_master
from ..shard.in_parts import part_at
from ..shard.sharded_tensor import ShardedTensor
from .pieces import Home, follow


class FlatState:
    """Moments, and what makes fp32 masters of low-precision parameters, laid out like the flat shard.

    Where it can, that is the remainder of the bf16 values; else it is a copy in fp32.
    """

    def __init__(self, flat: Home, device: torch.device) -> None:
        self.exp_avg = torch.zeros(flat.shard.numel(), dtype=torch.float32, device=device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.steps = [0] * len(flat.params)
        self.master: torch.Tensor | None = None
        self._version: float = -1
        self._device = device

    @property
    def nbytes(self) -> int:
        """Of moments and masters."""
        return sum(kept.nbytes for kept in (self.exp_avg, self.exp_avg_sq, self.master) if kept is not None)

    def splits(self, flat: Home) -> TypeGuard[FlatShard]:
        """Whether the masters are ``flat``'s values with their remainder."""
        return isinstance(flat, FlatShard) and can_split(flat) and flat.shard.device == self._device

    def master_of(self, flat: Home) -> torch.Tensor:
        """The fp32 values; follows values that were loaded or written since the last step.

        To be updated in place, unless they are split.
        """
        if flat.dtype == torch.float32 and flat.shard.device == self._device:
            return flat.shard
        flat.keep_writes()
        if self.splits(flat):
            return join(flat)
        self.master = follow(self.master, flat, self._version, self._device)
        self._version = flat.version
        return self.master

    def part_of_master(self, flat: FlatShard, index: int) -> ShardedTensor:
        """The fp32 values of one parameter; where they are split, they are made when they are read."""
        if flat.shard.device == self._device and can_split(flat):
            return part_of_joined(flat, index)
        return part_at(flat.place_of(index), flat.local(self.master_of(flat), index))

    def operands(self, flat: Home) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What a step updates in place; in which dtype or on which device else it is wanted; its remainder."""
        if self.splits(flat):
            flat.keep_writes()
            return flat.shard, None, remainder_of(flat)
        master = self.master_of(flat)
        return (master, None, None) if master is flat.shard else (master, flat.shard, None)

    def stepped(self, flat: Home, indices: Iterable[int]) -> None:
        """A step has changed ``indices`` of ``operands``: the masters of other optimizers are to follow."""
        changed = list(indices)
        flat.count_change(changed)
        if isinstance(flat, FlatShard):
            flat.step_on(changed)
            if not flat.unit.moves:  # autograd has saved the parameters themselves, which were written from below
                torch.autograd.graph.increment_version([flat.params[index] for index in changed])
                flat.forget_writes()
        self._version = flat.version

    def load_master(self, flat: Home, index: int, values: torch.Tensor) -> None:
        """Replace this rank's part of one parameter's master, and the parameter by its rounding."""
        if self.splits(flat):
            remainder_of(flat)
        else:
            flat.local(self.master_of(flat), index).copy_(values)
        if isinstance(flat, FlatShard):
            write_master(flat, values.float(), index)
        else:
            flat.shard.copy_(values)
        self._version = flat.version


def bytes_beside(dtype: torch.dtype, is_shared: bool) -> int:
    """Bytes that a FlatState and a remainder take for each element of values in ``dtype``.

    ``is_shared``: over several ranks, where bf16 values may be split.
    """
    master = 0 if dtype == torch.float32 else 2 if dtype == torch.bfloat16 and is_shared else 4
    return 4 + 4 + master
