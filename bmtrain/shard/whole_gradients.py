"""Whole gradients, kept as long as they are right."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


class WholeGradients:
    """Those that were asked for last, of one unit: who asks for one parameter's mostly asks for the next's.

    Nothing is kept once a gradient changes, a forward begins or an optimizer has stepped, on all ranks alike.
    """

    def __init__(self) -> None:
        self._unit: weakref.ref[object] | None = None
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}  # with what it was made of, and how often
        # that was written to by then

    def of(
        self, unit: object, key: int, part: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """(numel,) the whole of this rank's ``part``, not to be written.  Collective, as ``gather`` is.

        ``key`` is that of the flat shard, one of ``unit``'s.
        """
        if self._unit is None or self._unit() is not unit:
            self.forget()
            self._unit = weakref.ref(unit)
        whole, known, version = self._kept.get(key, (None, None, -1))
        written = -1 if part.is_inference() else part._version  # which torch does not count of those
        if whole is None or known is not part or version != written or written < 0:
            self._kept.pop(key, None)
            whole = gather(part)
            self._kept[key] = whole, part, written
        return whole

    def forget(self) -> None:
        """Let go of them."""
        if self._kept:
            self._kept = {}
