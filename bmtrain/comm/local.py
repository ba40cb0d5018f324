"""World size 1: nothing to talk to."""

from __future__ import annotations

import torch

from ..errors import CommunicationError
from .base import Communicator, ReduceOp


class LocalCommunicator(Communicator):
    """A group of one rank.  Every collective is a copy or nothing."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        self.check_sizes(shard, whole)
        if whole.data_ptr() != shard.data_ptr():
            whole.view(-1).copy_(shard.view(-1))

    def reduce_scatter(self, whole: torch.Tensor, shard: torch.Tensor, op: ReduceOp = "sum") -> None:
        self.all_gather(whole, shard)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> None:
        return None

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self._check_peer(root)

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        raise CommunicationError("There is one rank only, so there is nobody to send to.")

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        raise CommunicationError("There is one rank only, so there is nobody to receive from.")

    def barrier(self) -> None:
        return None

    def _check_peer(self, peer: int) -> None:
        if peer != 0:
            raise CommunicationError(f"Rank {peer} does not exist: the world size is 1.")
