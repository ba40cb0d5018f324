"""Sums over groups of ranks that keep the same parts."""

from __future__ import annotations

import torch

from .base import Communicator, ReduceOp


class ReplicatedCommunicator(Communicator):
    """The ranks of ``inner``; reductions go on over ``replicas``, the ranks that get the same part in other groups.

    A reduction moves all of a tensor within the group, and over the groups only the part that this rank keeps.
    """

    def __init__(self, inner: Communicator, replicas: Communicator) -> None:
        super().__init__(inner.rank, inner.world_size)
        self._inner, self._replicas = inner, replicas

    def reduce_scatter(self, whole: torch.Tensor, shard: torch.Tensor, op: ReduceOp = "sum") -> None:
        self._inner.reduce_scatter(whole, shard, op)
        self._replicas.all_reduce(shard, op)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> None:
        self._inner.all_reduce(tensor, op)
        self._replicas.all_reduce(tensor, op)

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        self._inner.all_gather(shard, whole)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self._inner.broadcast(tensor, root)

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        self._inner.send(tensor, peer)

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        self._inner.recv(tensor, peer)

    def barrier(self) -> None:
        self._inner.barrier()

    def alloc(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._inner.alloc(numel, dtype, device)

    def release(self, tensor: torch.Tensor) -> bool:
        return self._inner.release(tensor)

    def close(self) -> None:
        self._inner.close()
        self._replicas.close()

    def abort(self) -> None:
        self._inner.abort()
        self._replicas.abort()

    def check_async_error(self) -> None:
        self._inner.check_async_error()
        self._replicas.check_async_error()
