"""CPU collectives over gloo, as torch ships it."""

from __future__ import annotations

import atexit
import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ..errors import CommunicationError
from .base import Communicator, ReduceOp

_OPS: dict[ReduceOp, Any] = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # gloo has no average: divide afterwards
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
}
_PATIENCE = 6.0  # seconds
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class GlooCommunicator(Communicator):
    """Ranks on CPUs.  A private process group: torch.distributed's default one stays the user's to create."""

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout: timedelta, beside: GlooCommunicator | None = None
    ) -> None:
        """Meet the other ranks at ``store``; on the port of ``beside``, with the thread that listens there."""
        super().__init__(rank, world_size)
        options: Any = timeout
        if beside is not None:
            same = beside._group.options
            options = type(same)()
            options._devices, options._threads, options._timeout = same._devices, same._threads, timeout
        self._open: Any = dist.ProcessGroupGloo(store, rank, world_size, options)
        _alive.add(self)

    @property
    def _group(self) -> Any:
        if self._open is None:
            raise CommunicationError("This process has left the other ranks, after an error or bmt.shutdown().")
        return self._open

    def close(self) -> None:
        """Close the connections: whoever waits for this rank gets an error."""
        self._open = None

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        self.check_sizes(shard, whole)
        # As bytes: gloo knows fewer dtypes than torch, and a gather does no arithmetic.
        source, target = shard.view(-1).view(torch.uint8), whole.view(-1).view(torch.uint8)
        if source.numel():
            _run(lambda: self._group._allgather_base(target, source))

    def reduce_scatter(self, whole: torch.Tensor, shard: torch.Tensor, op: ReduceOp = "sum") -> None:
        self.check_sizes(shard, whole)
        if not shard.numel():
            return
        # Low precision is summed in fp32 and rounded once.
        wide = whole.view(-1).float() if whole.dtype in _LOW_PRECISION else whole.view(-1)
        result = torch.empty(shard.numel(), dtype=wide.dtype, device="cpu")
        options = dist.ReduceScatterOptions()
        options.reduceOp = _OPS[op]
        _run(lambda: self._group._reduce_scatter_base(result, wide, options))
        if op == "avg":
            result /= self.world_size
        shard.view(-1).copy_(result)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> None:
        wide = tensor.float() if tensor.dtype in _LOW_PRECISION else tensor
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        _run(lambda: self._group.allreduce([wide], options))
        if op == "avg":
            wide = wide / self.world_size
        if wide is not tensor:
            tensor.copy_(wide)

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> Callable[[], None]:
        if op == "avg" or tensor.dtype in _LOW_PRECISION:
            return super().start_all_reduce(tensor, op)
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        work = self._group.allreduce([tensor], options)
        return lambda: _run(lambda: work)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self._check_peer(root)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        _run(lambda: self._group.broadcast([tensor.view(-1).view(torch.uint8)], options))

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        self._check_peer(peer)
        _run(lambda: self._group.send([tensor.view(-1).view(torch.uint8)], peer, 0))

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        self._check_peer(peer)
        _run(lambda: self._group.recv([tensor.view(-1).view(torch.uint8)], peer, 0))

    def barrier(self) -> None:
        _run(lambda: self._group.barrier(dist.BarrierOptions()))

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.world_size:
            raise CommunicationError(f"Rank {peer} does not exist: the world size is {self.world_size}.")


def _run(collective: Callable[[], Any]) -> None:
    try:
        collective().wait()
    except RuntimeError as error:
        raise CommunicationError(
            f"A collective failed: {error}. Usually another rank stopped or ran different code; its own error is the "
            "cause."
        ) from error


def let_others_speak_first() -> None:
    """Let the process live for some seconds after gloo would have ended it.

    Where ranks come to collectives of different sizes, a thread of gloo's throws what nobody can catch, and the process
    is aborted before anybody can say which rank differs.  From now on that thread waits first.
    """
    with suppress(OSError, AttributeError):  # another C++ library: the process ends at once
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate.restype = _Abort.kind
        if _Abort.before is None:
            _Abort.before = set_terminate(_Abort.later)


def _abort_later() -> None:
    time.sleep(_PATIENCE)
    _Abort.before()


class _Abort:
    """What C++ calls for an exception that nobody catches; kept, as C++ does not count references."""

    kind = ctypes.CFUNCTYPE(None)
    later = kind(_abort_later)
    before: Any = None


_alive: WeakSet[GlooCommunicator] = WeakSet()


@atexit.register
def _close_all() -> None:
    # A group's threads may still let go of a finished collective's tensors, which takes Python's lock. Once Python is
    # shutting down, whoever asks for that lock is killed, and the whole process with it: so they end before.
    for communicator in list(_alive):
        communicator.close()
