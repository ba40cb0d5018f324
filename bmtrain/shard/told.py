"""What ranks tell each other at the end of a backward: which parameters have got a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..context import Context
from ..errors import RankDivergenceError


class Told:
    """One exchange, on hosts alone.  All ranks begin it; who reads it waits for the others' hosts, for no device.

    Args:
        touched: for each parameter, whether this rank has a gradient for it.
        steps: how many optimizer steps this rank has made.
    """

    def __init__(self, ctx: Context, touched: Sequence[bool], steps: int) -> None:
        self._rank, self._steps = ctx.rank, steps
        # 32 bits are enough for steps, and the flags are few.
        self._most = torch.tensor([steps, -steps, *touched], dtype=torch.int32, device="cpu")
        self._wait = ctx.control.start_all_reduce(self._most, "max")
        self._flags: list[int] | None = None

    def is_used(self, number: int) -> bool:
        """Whether any rank has a gradient for parameter ``number``."""
        return bool(self._come()[number])

    def are_used(self, first: int, count: int) -> bool:
        """The same of so many parameters from ``first`` on: whether of all."""
        return all(self._come()[first : first + count])

    def require_same_steps(self) -> None:
        """Raises RankDivergenceError unless all ranks had made as many optimizer steps."""
        self._come()
        most, least = int(self._most[0]), -int(self._most[1])
        if most != least:
            raise RankDivergenceError(
                f"Rank {self._rank} came to the end of a backward after {self._steps} optimizer steps; some ranks had "
                f"made {most} by then, and others {least}. An optimizer steps on what all ranks have parts of: call "
                "optimizer.step() on every rank, equally often."
            )

    def _come(self) -> list[int]:
        if self._flags is None:
            self._wait()
            self._flags = self._most[2:].tolist()
        return self._flags
