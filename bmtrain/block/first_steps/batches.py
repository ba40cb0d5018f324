"""Whether the ranks train on different batches, asked once at the start of a model's training."""

from __future__ import annotations

from collections import deque

import torch

from ...alike import digest
from ...context import Context
from ...log import warn
from ...users_code import users_line
from ..summary import first_tensor
from .steps import FirstSteps

_BATCHES, _STEPS = 2, 3
"""How many batches are compared, at which optimizer step of a model."""


def batch_digest(inputs: object) -> torch.Tensor | None:
    """() int64 of the batch in a forward's arguments; None if its values are not there to be looked at."""
    first = first_tensor(inputs)
    if type(first) is not torch.Tensor or first.layout != torch.strided or first.is_meta:
        return None
    with torch.no_grad():
        return digest(first)


class FirstBatches:
    """Digests of the latest training batches, compared at one of the first optimizer steps."""

    def __init__(self, ctx: Context, first_steps: FirstSteps) -> None:
        self._ctx, self._first_steps = ctx, first_steps
        self._digests: deque[torch.Tensor] = deque(maxlen=_BATCHES)
        self._place, self._is_over = "", False

    def renew(self) -> None:
        """A model begins to train."""
        self._is_over = False

    @property
    def wanted(self) -> bool:
        """Whether batches are looked at now."""
        return self._ctx.topology.data_size > 1 and not self._is_over and self._first_steps.age < _STEPS

    def note(self, inputs: object) -> None:
        """An outermost forward is about to train on ``inputs``, of which the first tensor with rows counts."""
        first = batch_digest(inputs)
        if first is not None:
            self._digests.append(first)
            self._place = users_line()

    def optimizer_stepped(self) -> None:
        """Warn if all ranks have had the same batches.  Collective once."""
        if not self.wanted or self._first_steps.age < _STEPS - 1:
            return
        self._is_over = True
        here = [int(one) for one in self._digests] if len(self._digests) == _BATCHES else [self._ctx.rank] * _BATCHES
        bounds = torch.tensor([*here, *(~number for number in here)], device="cpu")
        self._ctx.control.all_reduce(bounds, "max")
        same = all(int(most) == ~int(least) for most, least in zip(bounds[:_BATCHES], bounds[_BATCHES:], strict=True))
        if same and self._ctx.rank == 0:
            warn(
                f"All ranks train on the same batches ({self._place}): each repeats the work of the others. Give every "
                "rank its share: bmt.shard_loader(loader), or bmt.shard_batch(batch).",
                stacklevel=2,
            )
