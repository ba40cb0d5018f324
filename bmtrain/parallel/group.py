"""The tensor-parallel group of this process."""

from __future__ import annotations

from ..comm import Communicator
from ..context import context
from ..errors import ConfigurationError


def tensor_group() -> Communicator:
    """The ranks that hold the slices of one layer with this one."""
    return context().tensor_group


def slice_of(features: int, what: str) -> int:
    """How many of ``features`` one rank of the group holds.  Raises ConfigurationError if they cannot be split
    evenly.
    """
    size = context().topology.tp_size
    if features % size:
        raise ConfigurationError(
            f"{what} is {features}, which cannot be split evenly over {size} tensor-parallel ranks."
        )
    return features // size
