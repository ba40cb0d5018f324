"""The tensor-parallel group of this process."""

from __future__ import annotations

from ..comm import Communicator, LocalCommunicator
from ..context import context
from ..errors import ConfigurationError, UnsupportedError


def tensor_group() -> Communicator:
    """The ranks that hold the slices of one layer with this one."""
    if context().topology.tp_size > 1:
        raise UnsupportedError("Tensor parallelism is not in this version; leave tp_size out of init_distributed().")
    return LocalCommunicator()


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
