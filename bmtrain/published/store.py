"""Saving and exchanging objects under the published module name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from ..checkpoint import load, save
from ..context import context
from ..objects import allgather_objects, broadcast_object

__all__ = ["DistributedStateDictWrapper", "allgather_objects", "broadcast_object", "load", "save"]


class DistributedStateDictWrapper(OrderedDict[str, Any]):
    """Rank 0's state dict on every rank, for ``model.load_state_dict``; what the others pass does not matter.
    Collective.
    """

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        super().__init__(broadcast_object(dict(state_dict) if context().rank == 0 else None))


def _save_to_rank0(
    model: torch.nn.Module, destination: MutableMapping[str, Any] | None = None, prefix: str = ""
) -> MutableMapping[str, Any]:
    """The model's whole state dict on rank 0 and an empty one elsewhere, added to ``destination``.  Collective."""
    destination = OrderedDict() if destination is None else destination
    whole = model.state_dict(prefix=prefix)
    if context().rank == 0:
        destination.update(whole)
    return destination
