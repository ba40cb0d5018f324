"""What scripts written for the published library ask of a parameter, answered for the layout here.

Names are the published ones.  A parameter shows its whole shape, so ``p.shape`` and ``p._original_shape`` are equal;
``p._start_partition`` and ``p._end_partition`` say which elements of the flattened whole this rank keeps.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..comm import Communicator
from ..context import context
from .place import Place
from .slices import Split, joined, whole_shape


class Home(Protocol):
    """What is asked of where a parameter lies."""

    @property
    def in_block(self) -> bool:
        """Whether a Block gathers it."""

    def place_of(self, index: int) -> Place:
        """Where this rank's part of a parameter is among all parts."""


class PublishedFacts:
    """Mixin of DistributedParameter.  All are facts to read."""

    __slots__ = ()
    _flat: Any
    _index: int
    _tp_mode: bool
    _tp_split_dim: int
    _split: Split | None

    @property
    def _original_shape(self) -> torch.Size:
        """The whole shape; of a tensor-parallel rank's slice."""
        return self.shape  # type: ignore[attr-defined, no-any-return]

    @property
    def _tp_original_shape(self) -> torch.Size:
        """The shape over all tensor-parallel ranks."""
        return torch.Size(whole_shape(context(), tuple(self._original_shape), self._split))

    @property
    def _start_partition(self) -> int:
        return self._kept().start

    @property
    def _end_partition(self) -> int:
        return self._kept().stop

    def _kept(self) -> range:
        """Which elements of the flattened whole this rank keeps: all until it is sharded."""
        home: Home | None = self._flat
        if home is None:
            return range(self.numel())  # type: ignore[attr-defined]
        kept = home.place_of(self._index).kept
        return range(kept.start, kept.stop)

    @property
    def _in_block(self) -> bool:
        home: Home | None = self._flat
        return home is not None and home.in_block

    @property
    def _zero_comm(self) -> Communicator:
        """The ranks that it is spread over."""
        return context().shard_group

    def gather_all(self) -> torch.Tensor:
        """The whole value over tensor-parallel ranks as well.  Collective; a slice's is not differentiable."""
        return joined(context(), self.gather(), self._split)  # type: ignore[attr-defined]

    def tp_gather(self) -> torch.Tensor:
        """The same."""
        return self.gather_all()

    def _copy_data(self, data: torch.Tensor) -> None:
        """Take the values of ``data``, the whole tensor, the same on all ranks.  Collective."""
        with torch.no_grad():
            self.copy_(data.view(self.shape))  # type: ignore[attr-defined]
