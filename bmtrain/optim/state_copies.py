"""The tensors of an optimizer's state dict: copies of the whole, which say so when they are read after a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..errors import ShardedAccessError
from ..shard.engine import engine
from ..shard.sharded_tensor import ShardedTensor, unsliced
from ..shard.state_copies import StateTensor


@dataclass(eq=False)
class OfState:
    """What an optimizer keeps, of which there is a copy.

    Args:
        version: another one when it may have changed.
        shown: what is kept, over the optimizer's own memory: a ShardedTensor, or an ordinary tensor; None where no
            write is taken.
        changed: called after a write to ``shown``.
    """

    version: Callable[[], Hashable]
    shown: Callable[[], torch.Tensor] | None = None
    changed: Callable[[torch.Tensor], None] = lambda shown: None
    owner = "optimizer"

    def __post_init__(self) -> None:
        self._seen = self.version()

    def has_moved(self, copy: torch.Tensor) -> bool:
        """Whether it may have other values now than when ``copy`` was last made the same."""
        return self.version() != self._seen

    def read(self, copy: torch.Tensor) -> None:
        """Give ``copy`` the present values.  Collective."""
        shown = self._kept()
        copy.copy_(unsliced(shown) if isinstance(shown, ShardedTensor) else shown)
        self._seen = self.version()

    @torch.no_grad()
    def write(self, copy: torch.Tensor) -> None:
        """Take the values of ``copy``.  Collective."""
        shown = self._kept()
        engine().meet("the write into a tensor of an optimizer's state dict")
        shown.copy_(copy.to(shown.device))
        self.changed(shown)
        self._seen = self.version()

    def _kept(self) -> torch.Tensor:
        if self.shown is None:
            raise ShardedAccessError(
                "This tensor of a state dict is a copy of what no write reaches, and one would be lost. Give the "
                "changed state dict to optimizer.load_state_dict."
            )
        return self.shown()


def linked(value: Any, original: Callable[[], OfState]) -> Any:
    """The tree ``value`` of copies, whose tensors are linked to what they were taken of."""
    return tree_map(lambda leaf: StateTensor.of(leaf, original()) if type(leaf) is torch.Tensor else leaf, value)
