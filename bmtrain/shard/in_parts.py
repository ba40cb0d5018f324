"""State of which every rank gives and takes its own part, as a checkpoint asks for it.

It is a tree of plain values and tensors.  A ShardedTensor is in parts, an Owned is one rank's, and every other tensor
is whole and the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from .place import Part, Place
from .sharded_tensor import ShardedTensor


@dataclass(frozen=True, eq=False)
class Owned:
    """A whole tensor of rank ``owner``, and of the ranks that replicate it; nobody else has its ``values``."""

    owner: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor | None


@runtime_checkable
class InParts(Protocol):
    """An optimizer, or what drives some."""

    def parts(self) -> dict[str, object]:
        """The present state.  What it holds may be memory that training changes, or be made when it is read.
        Collective.
        """

    def part_at(self, path: tuple[object, ...], shape: tuple[int, ...]) -> Place | bool:
        """What this rank needs of a stored tensor that was at ``path``: a part, all of it, or nothing."""

    def check_parts(self, state: dict[str, object]) -> None:
        """Raises CheckpointError on every rank if ``load_parts`` would.  Collective."""

    def load_parts(self, state: dict[str, object]) -> None:
        """Go on from ``state``, in which tensors are what ``part_at`` said.  Collective."""


def in_parts(obj: object) -> InParts | None:
    """What gives and takes the state of ``obj`` in parts; None if nothing does."""
    adapted = getattr(obj, "_bmt_in_parts", None)  # what optim.adapt put beside an optimizer of torch's
    found = obj if adapted is None else adapted
    return found if isinstance(found, InParts) else None


def part_at(place: Place, values: torch.Tensor) -> ShardedTensor:
    """(n,) this rank's part as a tensor of the whole shape; it stays the memory of ``values``."""
    return ShardedTensor(Part(place, own=values, is_kept=True))
