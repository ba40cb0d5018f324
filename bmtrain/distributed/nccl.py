"""Collectives on flat memory, under NCCL's names, for scripts that call them on tensors or on their storages.

The communicator is ``bmt.config["comm"]`` or any other Communicator; the transport need not be NCCL.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore

from ..comm import Communicator, GlooCommunicator, LocalCommunicator, ReduceOp
from ..comm.nccl_library import op_code, type_code
from ..context import context
from ..errors import ConfigurationError

NCCLCommunicator = Communicator
Memory = torch.Tensor | torch.UntypedStorage | torch.TypedStorage

_group: list[tuple[tuple[int, int, bool], Callable[[], None]]] | None = (
    None  # point-to-point calls that wait for groupEnd
)


def getUniqueId() -> bytes:
    """A name for a new communicator, which one rank makes and sends to the others (``bmt.store.broadcast_object``)."""
    return secrets.token_bytes(128)


def commInitRank(unique_id: bytes, world_size: int, rank: int) -> Communicator:
    """A communicator of ``world_size`` ranks, all or some, in which this one is ``rank``.

    Its tensors are on this process's device.  Collective of those ranks, who pass the same ``unique_id``.
    """
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"Rank {rank} does not exist in a group of {world_size}.")
    if world_size == 1:
        return LocalCommunicator()
    here = context()
    store: Any = PrefixStore(f"comm/{unique_id.hex()}", here.store)
    if not here.device.is_cuda:
        return GlooCommunicator(store, rank, world_size, here.timeout)
    from ..comm.nccl import NcclCommunicator

    return NcclCommunicator(store, "comm", rank, world_size, here.device.torch_device)


def commDestroy(comm: Communicator) -> None:
    """Give back what ``comm`` holds; it is not used afterwards."""
    if comm is context().world:
        raise ConfigurationError('bmt.config["comm"] is needed to the end; bmt.shutdown() closes it.')
    comm.close()


def dtype2nccl(dtype: torch.dtype) -> int:
    """NCCL's number for a dtype.  Raises ConfigurationError for one it does not know."""
    return _known(type_code(dtype), dtype)


def op2nccl(op: str) -> int:
    """NCCL's number for a reduction: "sum", "prod", "max", "min" or "avg".  Raises ConfigurationError for another."""
    return _known(op_code(op, torch.float32), op)


def _known(code: int | None, what: object) -> int:
    if code is None:
        raise ConfigurationError(f"NCCL has no {what!r}.")
    return code


def commCount(comm: Communicator) -> int:
    """Number of ranks."""
    return comm.world_size


def commRank(comm: Communicator) -> int:
    """This process's rank."""
    return comm.rank


def allReduce(src: Memory, dst: Memory, op: ReduceOp, comm: Communicator) -> None:
    """``dst`` = ``src`` reduced over ranks; they may be the same memory."""
    target = _copied(src, dst)
    comm.all_reduce(target, op)


def broadcast(src: Memory, dst: Memory, root: int, comm: Communicator) -> None:
    """``dst`` = ``root``'s ``src``."""
    comm.broadcast(_copied(src, dst), root)


def reduce(src: Memory, dst: Memory, op: ReduceOp, root: int, comm: Communicator) -> None:
    """``dst`` = ``src`` reduced over ranks, on ``root`` only."""
    result = _flat(src).clone()
    comm.all_reduce(result, op)
    if comm.rank == root:
        _flat(dst).copy_(result)


def allGather(src: Memory, dst: Memory, comm: Communicator) -> None:
    """``dst`` = every rank's ``src``, in rank order."""
    comm.all_gather(_flat(src), _flat(dst))


def reduceScatter(src: Memory, dst: Memory, op: ReduceOp, comm: Communicator) -> None:
    """``dst`` = this rank's part of ``src`` reduced over ranks."""
    comm.reduce_scatter(_flat(src), _flat(dst), op)


def send(src: Memory, peer: int, comm: Communicator) -> None:
    """Send ``src`` to ``peer``."""
    _run_or_queue(comm.rank, peer, comm, lambda: comm.send(_flat(src), peer))


def recv(dst: Memory, peer: int, comm: Communicator) -> None:
    """Fill ``dst`` with what ``peer`` sends."""
    _run_or_queue(peer, comm.rank, comm, lambda: comm.recv(_flat(dst), peer))


def groupStart() -> None:
    """From here to ``groupEnd``, sends and receives are collected, so that ranks may call them in any order."""
    global _group
    _group = []


def groupEnd() -> None:
    """Carry out what was collected."""
    global _group
    collected, _group = _group or [], None
    # Every rank follows the same order of pairs, and within a pair of directions, so no two ranks wait for each other.
    for _, call in sorted(collected, key=lambda entry: entry[0]):
        call()


def _run_or_queue(source: int, target: int, comm: Communicator, call: Callable[[], None]) -> None:
    if _group is None:
        call()
    else:
        _group.append(((min(source, target), max(source, target), source > target), call))


def _copied(src: Memory, dst: Memory) -> torch.Tensor:
    target, source = _flat(dst), _flat(src)
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)
    return target


def _flat(memory: Memory) -> torch.Tensor:
    if isinstance(memory, torch.Tensor):
        return memory.detach().view(-1)
    storage: Any = memory
    dtype = storage.dtype if isinstance(memory, torch.TypedStorage) else torch.uint8
    return torch.tensor([], dtype=dtype, device=storage.device).set_(storage)
