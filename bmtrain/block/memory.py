"""Recompute only what memory demands.

Blocks that were not told (``use_checkpoint=None``) are all recomputed at first.  That measures how many bytes each one
would keep and what the rest of a step needs; then as many blocks as fit keep their activations instead.  Both ways give
the same numbers.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._pytree import tree_leaves

from ..context import Context
from ..shard.unit import ShardUnit

_MEASURED_STEPS = 2  # by then the optimizer's state and every buffer are allocated
_GIB = 2**30


class RecomputePlan:
    """Decides for each block whether it keeps its activations.  On a CPU all are recomputed."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._steps = self._peak = 0
        self._decided = False
        self._bytes: dict[int, int] = {}
        self._inputs: dict[int, int] = {}
        self._kept: set[int] = set()

    @property
    def measuring(self) -> bool:
        """Whether frames should count what they would keep."""
        return self._ctx.device.measures_memory and not self._decided

    def recomputes(self, unit: ShardUnit, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether this forward of ``unit``'s block is to be recomputed."""
        if not self._ctx.device.measures_memory:
            return True
        size = sum(t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        if self.measuring:
            self._inputs[unit.index] = max(size, self._inputs.get(unit.index, 0))
            return True
        # What was measured says nothing of larger inputs.
        return unit.index not in self._kept or size > self._inputs.get(unit.index, 0)

    def measured(self, unit: ShardUnit, kept: int) -> None:
        """A forward of ``unit`` would have kept so many bytes."""
        self._bytes[unit.index] = max(kept, self._bytes.get(unit.index, 0))

    def optimizer_stepped(self) -> None:
        """An optimizer has updated its parameters."""
        self._steps += 1
        self._look()

    def run_starts(self) -> None:
        """A training run begins.  Collective once, when enough has been measured."""
        if not self.measuring:
            return
        self._look()
        if self._steps >= _MEASURED_STEPS:
            self._decided = True
            if self._bytes:
                self._decide()

    def _look(self) -> None:
        """Note the peak so far.  It is not reset, which is the user's to do, at any time."""
        if self.measuring:
            self._peak = max(self._peak, self._ctx.device.peak_memory())

    def _decide(self) -> None:
        order = sorted(self._bytes)
        facts = torch.tensor([-self._budget(), *(self._bytes[i] for i in order)], dtype=torch.int64, device="cpu")
        self._ctx.control.all_reduce(facts, "max")
        free, sizes = -int(facts[0]), dict(zip(order, facts[1:].tolist(), strict=True))
        left = free
        for index in reversed(order):  # the last blocks' activations are held for the shortest time
            if sizes[index] > left:
                break
            left -= sizes[index]
            self._kept.add(index)
        if self._ctx.rank == 0:
            print(
                f"bmtrain: {len(self._kept)} of {len(order)} blocks keep their activations "
                f"({max(sizes.values()) / _GIB:.2f} GiB a block, {max(free, 0) / _GIB:.1f} GiB to spare); "
                f"{len(order) - len(self._kept)} are recomputed.",
                file=sys.stderr,
            )

    def _budget(self) -> int:
        """Bytes that a step, as run so far, leaves free."""
        free, allocated, total = self._ctx.device.memory()
        return int(free + allocated - self._peak - max(_GIB, 0.04 * total))
