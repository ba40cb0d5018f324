"""Blocks under the published module name, with the helpers that scripts took from there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from ..block import Block, CheckpointBlock, TransformerBlockList
from ..shard import gathered
from ..utils import round_up

__all__ = [
    "Block",
    "CheckpointBlock",
    "CheckpointBlockContext",
    "TransformerBlockList",
    "round_up",
    "storage_type_cuda",
]


class CheckpointBlockContext:
    """Whole parameters of ``block``, between ``enter()`` and ``exit()`` or inside a ``with``.  See ``bmt.gathered``.

    The other arguments steered the published engine and are not needed: gradients are reduced when the backward is
    through.
    """

    def __init__(self, block: torch.nn.Module, *_ignored: Any, **_ignored_too: Any) -> None:
        self._block = block
        self._gathered: AbstractContextManager[None] | None = None

    def enter(self, *_ignored: Any, **_ignored_too: Any) -> None:
        """Gather.  Collective."""
        self._gathered = gathered(self._block)
        self._gathered.__enter__()

    def exit(self, *_ignored: Any, **_ignored_too: Any) -> None:
        """Release."""
        if self._gathered is not None:
            self._gathered.__exit__(None, None, None)
            self._gathered = None

    def __enter__(self) -> None:
        self.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.exit()


def storage_type_cuda(storage_type: type) -> type:
    """The storage class on GPUs that corresponds to a storage class on the CPU; a class of GPU storages itself."""
    if storage_type.__module__ == "torch.cuda":
        return storage_type
    found = getattr(torch.cuda, storage_type.__name__, None)
    if not isinstance(found, type):
        raise ValueError(f"{storage_type!r} has no counterpart on GPUs.")
    return found
