"""Ranks on GPUs, over NCCL communicators of our own.

torch's process groups do not offer what overlap needs: a CTA policy for each communicator, and buffers in symmetric
windows.  Both come from NCCL itself, through bmtrain._C and the NCCL library that torch has loaded.  On an NCCL too
old for them the same calls work, only slower; a warning says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from ..device import current_stream_handle
from ..errors import CommunicationError, ConfigurationError, DeviceError
from ..log import warn
from . import nccl_library as library
from .base import Communicator, ReduceOp
from .nccl_library import arena_bytes, available, version

__all__ = ["NcclCommunicator", "Policy", "Store", "arena_bytes", "available", "group", "version"]

if library.built:
    from .. import _C

Policy = Literal["default", "efficiency", "zero"]

_POLICIES: dict[str, int] = {"default": 0, "efficiency": 1, "zero": 2}
_DEFAULT_STREAM = 0


class Store(Protocol):
    """What ranks need to meet: the part of torch.distributed.Store that is used here."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter and return its new value."""

    def set(self, key: str, value: bytes, /) -> None:
        """Put a value where every rank can get it."""

    def get(self, key: str, /) -> bytes:
        """Wait for a value and return it."""


@contextmanager
def group() -> Iterator[None]:
    """Queue the body's calls, of any communicators, as one operation; needed for sends and receives that cross."""
    with _off_default_stream():
        _C.nccl.group_start()
        try:
            yield
        finally:
            _C.nccl.group_end()


_LINEAR = ("sum", "avg")  # of complex numbers: of their parts


class NcclCommunicator(Communicator):
    """A group of GPUs.  Every method but ``abort`` and ``check_async_error`` is collective.

    Operations are queued on torch's current CUDA stream of ``device`` and return at once.  The tensors must stay
    allocated until that stream has passed them, as with any CUDA operation.

    Args:
        store: where the ranks meet.
        name: tells apart the communicators that meet in ``store``.
        rank, world_size: this process's place in the group.
        device: this process's GPU.
        policy: "zero" moves gathers with copy engines where buffers come from ``alloc``, "efficiency" uses few
            multiprocessors, "default" uses what is fastest alone.

    Raises CommunicationError when NCCL is missing or fails, DeviceError when ``device`` is no GPU of this machine.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        policy: Policy = "default",
    ) -> None:
        super().__init__(rank, world_size)
        if policy not in _POLICIES:
            raise ConfigurationError(f"policy must be one of {', '.join(_POLICIES)}, not {policy!r}.")
        if not 0 <= rank < world_size:
            raise ConfigurationError(f"Rank {rank} does not exist in a group of {world_size}.")
        self.device = _checked(device)
        self.policy = policy
        version()
        if policy != "default" and not _C.nccl.has_policies():
            self._say(f"NCCL {version()} has no CTA policies (2.28 has); collectives will slow down computation.")
        unique_id = _exchange_id(store, name, rank)
        with torch.cuda.device(self.device):
            self._handle = _C.nccl.Communicator(
                id=unique_id, rank=rank, world_size=world_size, policy=_POLICIES[policy]
            )
            self._token = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._windows = world_size > 1

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        self.check_sizes(shard, whole)
        count, dtype = self._elements(shard, whole)
        self._queue(self._handle.all_gather, shard=shard.data_ptr(), whole=whole.data_ptr(), count=count, dtype=dtype)

    def reduce_scatter(self, whole: torch.Tensor, shard: torch.Tensor, op: ReduceOp = "sum") -> None:
        self.check_sizes(shard, whole)
        self._check(shard, whole)
        count, dtype, code = self._reduction(shard, op)
        self._queue(
            self._handle.reduce_scatter, whole=whole.data_ptr(), shard=shard.data_ptr(), count=count, dtype=dtype,
            op=code,
        )  # fmt: skip

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> None:
        self._check(tensor)
        count, dtype, code = self._reduction(tensor, op)
        address = tensor.data_ptr()
        self._queue(self._handle.all_reduce, source=address, target=address, count=count, dtype=dtype, op=code)

    def reduce(self, tensor: torch.Tensor, root: int, op: ReduceOp = "sum") -> None:
        """Reduce ``tensor`` over ranks in place at ``root``; the other ranks' tensors stay as they are."""
        self._check(tensor)
        self._check_rank(root)
        count, dtype, code = self._reduction(tensor, op)
        address = tensor.data_ptr()
        self._queue(self._handle.reduce, source=address, target=address, count=count, dtype=dtype, op=code, root=root)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self._check_rank(root)
        count, dtype = self._elements(tensor)
        address = tensor.data_ptr()
        self._queue(self._handle.broadcast, source=address, target=address, count=count, dtype=dtype, root=root)

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        self._check_rank(peer)
        count, dtype = self._elements(tensor)
        self._queue(self._handle.send, data=tensor.data_ptr(), count=count, dtype=dtype, peer=peer)

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        self._check_rank(peer)
        count, dtype = self._elements(tensor)
        self._queue(self._handle.recv, data=tensor.data_ptr(), count=count, dtype=dtype, peer=peer)

    def barrier(self) -> None:
        self.all_reduce(self._token)
        torch.cuda.current_stream(self.device).synchronize()

    def group(self) -> AbstractContextManager[None]:
        return group()

    def alloc(self, numel: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """A flat, uninitialised buffer in a symmetric window, which NCCL reads and writes in place on all ranks.

        Collective, with equal sizes on all ranks.  The memory is given back when the last tensor on it is gone and
        every communicator has released its window on it (``release`` or ``close``).  Where NCCL has no windows this
        is ordinary memory.
        """
        if device is not None and _checked(device) != self.device:
            raise DeviceError(f"This communicator's buffers are on {self.device}, not on {device}.")
        if numel == 0 or not self._windows or not _C.nccl.has_arenas():
            return torch.empty(numel, dtype=dtype, device=self.device)
        size = numel * dtype.itemsize
        with torch.cuda.device(self.device):
            if size > torch.cuda.mem_get_info()[0]:
                torch.cuda.empty_cache()  # NCCL cannot take what torch holds in reserve
            arena = _C.nccl.Arena(bytes=size, device=self.device.index)
        tensor = from_dlpack(arena.to_dlpack())[:size].view(dtype)
        self.register(tensor)
        return tensor

    def register(self, tensor: torch.Tensor) -> bool:
        """Open a window on memory that another NcclCommunicator's ``alloc`` made.  Collective.

        Returns whether there is a window; without one the tensor can be used all the same.
        """
        if not self._windows:
            return False
        with torch.cuda.device(self.device):
            problem = self._handle.register_window(tensor.data_ptr())
        if problem:
            self._windows = False
            self._say(f"NCCL {version()} opens no symmetric windows here ({problem}); collectives will be slower.")
        return not problem

    def release(self, tensor: torch.Tensor) -> bool:
        """Close the window on ``tensor``'s memory, once all work on it is done.  Collective; False if there is none."""
        torch.cuda.synchronize(self.device)
        return self._handle.deregister_window(tensor.data_ptr())

    def split(self, color: int | None, key: int) -> NcclCommunicator | None:
        """A communicator of the ranks that pass the same ``color``, ordered by ``key``; None for color None."""
        with torch.cuda.device(self.device):
            handle = self._handle.split(color=-1 if color is None else color, key=key, policy=_POLICIES[self.policy])
        if handle is None:
            return None
        part = object.__new__(NcclCommunicator)
        Communicator.__init__(part, handle.rank, handle.world_size)
        part.device, part.policy, part._handle, part._token = self.device, self.policy, handle, self._token.clone()
        part._windows = handle.world_size > 1
        return part

    def check_async_error(self) -> None:
        """Raise CommunicationError if an operation queued earlier has failed since."""
        self._handle.check_async_error()

    def close(self) -> None:
        """Wait for all work on the device, then leave.  Calling it again does nothing.

        Raises CommunicationError when NCCL reports an error (what it held is given back all the same), and when
        another thread is still inside a call (then nothing has changed).
        """
        if self._handle.is_open:
            torch.cuda.synchronize(self.device)
            self._handle.close()

    def abort(self) -> None:
        """Leave, ending operations that wait for other ranks.  For any thread.

        A call that another thread is in gets a second to return before NCCL ends it.
        """
        self._handle.abort()

    def _queue(self, operation: Callable[..., None], **arguments: int) -> None:
        """Call ``operation`` on the current stream.

        NCCL may say so here that another rank is gone: as the cause of an error, it is no refusal of this rank's.
        """
        stream = current_stream_handle(self.device.index)
        try:
            if self.policy != "zero" or stream != _DEFAULT_STREAM:
                operation(**arguments, stream=stream)
                return
            with _off_default_stream(self.device):
                operation(**arguments, stream=current_stream_handle(self.device.index))
        except CommunicationError as error:
            raise CommunicationError(str(error)) from error

    def _check(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if tensor.device != self.device:
                raise CommunicationError(f"This communicator moves tensors on {self.device}, not on {tensor.device}.")
            if not tensor.is_contiguous():
                raise CommunicationError("Collectives need contiguous tensors; call .contiguous() first.")

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise CommunicationError(f"Rank {rank} does not exist in a group of {self.world_size}.")

    def _elements(self, tensor: torch.Tensor, *others: torch.Tensor) -> tuple[int, int]:
        """Count and type code for moving ``tensor``; types that NCCL does not know move as bytes."""
        self._check(tensor, *others)
        code = library.type_code(tensor.dtype)
        return (tensor.numel(), code) if code is not None else (tensor.numel() * tensor.element_size(), library.BYTE)

    def _reduction(self, tensor: torch.Tensor, op: ReduceOp) -> tuple[int, int, int]:
        """Count, type and operation codes for reducing ``tensor``; complex numbers are summed as their two parts."""
        parts = torch.view_as_real(tensor) if tensor.is_complex() and op in _LINEAR else tensor
        dtype, code = library.type_code(parts.dtype), library.op_code(op, parts.dtype)
        if dtype is None or code is None:
            raise CommunicationError(f"NCCL {version()} cannot reduce {tensor.dtype} by {op!r}.")
        return parts.numel(), dtype, code

    def _say(self, text: str) -> None:
        if self.rank == 0:
            warn(text, 4, RuntimeWarning)


@contextmanager
def _off_default_stream(device: torch.device | None = None) -> Iterator[None]:
    """Run the body on another stream if the current one is CUDA's default, and let the default stream wait for it.

    Copy engines serve NCCL through batched copies, which CUDA refuses on the default stream.
    """
    default = torch.cuda.current_stream(device)
    if default.cuda_stream != _DEFAULT_STREAM:
        yield
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(default)
    with torch.cuda.stream(side):
        yield
    default.wait_stream(side)


def _checked(device: torch.device) -> torch.device:
    """``device`` with its index.  Raises DeviceError unless it is a GPU of this machine."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise DeviceError(f"NCCL works on GPUs; {device} is none that torch can use here.")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise DeviceError(f"There is no {device}: torch sees {torch.cuda.device_count()} GPUs here.")
    return torch.device("cuda", index)


def _exchange_id(store: Store, name: str, rank: int) -> bytes:
    """The unique id that rank 0 of this communicator made.

    Each rank counts how often it has used ``name``, so that a name can be used again after ``close``.
    """
    generation = store.add(f"nccl/{name}/{rank}", 1)
    key = f"nccl/{name}/id/{generation}"
    if rank == 0:
        store.set(key, _C.nccl.unique_id())
    return bytes(store.get(key))
