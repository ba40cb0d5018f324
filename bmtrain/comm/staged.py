"""An NCCL communicator that takes little memory for what is small or rare.

NCCL connects the ranks of a communicator, with buffers of hundreds of MiB, when it first moves memory without a window.
So gathers, and reductions of little, go through windows of their own here; only large reductions and the rest connect.
"""

from __future__ import annotations

from typing import get_args

import torch

from ..device import current_stream_handle
from .base import ReduceOp
from .nccl import NcclCommunicator
from .nccl_library import built

if built:
    from .. import _C

_WHOLE = 16 << 20  # bytes that arrive at once, of all ranks together
_SMALL = 16 << 10  # bytes up to which every rank may reduce by itself what all have sent
_ALIGNMENT = 128  # bytes; NCCL's kernels for windows want aligned parts
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


class StagedCommunicator(NcclCommunicator):
    """As NcclCommunicator; ``all_gather`` and small ``all_reduce`` work on copies in windows."""

    _staging: tuple[torch.Tensor, torch.Tensor] | None = None

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        if not self._stages or not shard.numel():
            super().all_gather(shard, whole)
            return
        self.check_sizes(shard, whole)
        self._check(shard, whole)
        sent, rows = _bytes(shard), _bytes(whole).view(self.world_size, -1)
        at_once = self._part()
        for start in range(0, sent.numel(), at_once):
            part = sent[start : start + at_once]
            rows[:, start : start + at_once].copy_(self._exchange(part)[:, : part.numel()])

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> None:
        small = tensor.numel() * tensor.element_size() <= min(_SMALL, self._part())
        whole_numbers = op == "avg" and not tensor.is_floating_point()
        known = tensor.dtype in _DTYPES and op in get_args(ReduceOp)
        if not (self._stages and small and known) or whole_numbers or not tensor.numel():
            super().all_reduce(tensor, op)
            return
        self._check(tensor)
        every = self._exchange(_bytes(tensor)).view(tensor.dtype)[:, : tensor.numel()]
        tensor.detach().copy_(_reduced(every, op).view_as(tensor))

    @property
    def _stages(self) -> bool:
        """Whether to go through windows, if they open: the same on all ranks, which must run the same collectives."""
        return self.world_size > 1 and _C.nccl.has_arenas() and _C.nccl.has_windows()

    def _part(self) -> int:
        """Bytes of one rank that are sent at once."""
        return _WHOLE // self.world_size // _ALIGNMENT * _ALIGNMENT

    def _exchange(self, part: torch.Tensor) -> torch.Tensor:
        """(world_size, n) what every rank has sent, bytes, good until the next exchange; n is padded."""
        if self._staging is None:
            size = self._part()
            with torch.inference_mode(False):  # the buffers outlive the caller's mode
                self._staging = self.alloc(size, torch.uint8), self.alloc(size * self.world_size, torch.uint8)
            self._stream = torch.cuda.current_stream(self.device)
        elif current_stream_handle(self.device.index) != self._stream.cuda_stream:
            last, self._stream = self._stream, torch.cuda.current_stream(self.device)
            self._stream.wait_stream(last)
        count = -(-part.numel() // _ALIGNMENT) * _ALIGNMENT
        shard, whole = self._staging[0][:count], self._staging[1][: count * self.world_size]
        shard[: part.numel()].copy_(part)
        super().all_gather(shard, whole)
        return whole.view(self.world_size, count)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _reduced(every: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    """(n,) from (ranks, n), in the same order on every rank."""
    if op == "max":
        return every.amax(0)
    if op == "min":
        return every.amin(0)
    if op == "prod":
        return every.prod(0, dtype=every.dtype)
    total = every.sum(0, dtype=every.dtype)
    return total / len(every) if op == "avg" else total
