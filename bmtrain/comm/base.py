"""The one interface through which ranks talk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from ..errors import CommunicationError

ReduceOp = Literal["sum", "avg", "max", "min", "prod"]


class Communicator(ABC):
    """A group of ranks over one transport.

    Every method is collective: all ranks of the group call it in the same order with equal sizes and dtypes.
    Tensors must be contiguous.  On CPU transports a call returns when it is done; on NCCL it is queued on the
    current CUDA stream.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    @abstractmethod
    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        """Fill ``whole`` (world_size * n elements) with every rank's ``shard`` (n elements) in rank order."""

    @abstractmethod
    def reduce_scatter(self, whole: torch.Tensor, shard: torch.Tensor, op: ReduceOp = "sum") -> None:
        """Reduce ``whole`` (world_size * n elements) over ranks; this rank's n elements go to ``shard``."""

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> None:
        """Reduce ``tensor`` over ranks in place."""

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> Callable[[], None]:
        """The same, maybe meanwhile: ``tensor`` is to be read after a call of what is returned."""
        self.all_reduce(tensor, op)
        return lambda: None

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Overwrite ``tensor`` with ``root``'s."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, peer: int) -> None:
        """Send ``tensor`` to rank ``peer``, which calls ``recv``."""

    @abstractmethod
    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        """Fill ``tensor`` with what rank ``peer`` sends."""

    @abstractmethod
    def barrier(self) -> None:
        """Return only after every rank has called this."""

    def group(self) -> AbstractContextManager[None]:
        """Collectives inside the ``with`` may be queued as one, when it ends.  No memory is allocated in it."""
        return nullcontext()

    def alloc(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat buffer this transport moves fastest.  Collective."""
        return torch.empty(numel, dtype=dtype, device=device)

    def release(self, tensor: torch.Tensor) -> bool:
        """Let go of a buffer that ``alloc`` made.  Collective; False if the transport held nothing of it."""
        return False

    def close(self) -> None:  # noqa: B027 - most transports hold nothing
        """Give back what the transport holds.  Not used afterwards."""

    def abort(self) -> None:
        """Leave at once, so that ranks which wait for this one fail instead.  Not used afterwards."""
        self.close()

    def check_async_error(self) -> None:  # noqa: B027 - most transports raise where they fail
        """Raise CommunicationError if an operation queued earlier has failed since.  For any thread."""

    def check_sizes(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        """Raise CommunicationError unless ``whole`` holds exactly one ``shard`` for each rank."""
        if whole.numel() != self.world_size * shard.numel() or whole.dtype != shard.dtype:
            raise CommunicationError(
                f"Over {self.world_size} ranks a shard of {shard.numel()} {shard.dtype} elements needs a whole of "
                f"{self.world_size * shard.numel()}; got {whole.numel()} of {whole.dtype}."
            )
        if not (shard.is_contiguous() and whole.is_contiguous()):
            raise CommunicationError("Collectives need contiguous tensors; call .contiguous() first.")
