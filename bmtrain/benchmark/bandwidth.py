"""Bandwidth of collectives over sizes from 1 KB to 4 GB (powers of two)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ..context import context, synchronize
from ..utils import print_block, print_rank, round_up

SIZES = tuple(1 << power for power in range(10, 33))
"""Bytes of the whole tensor, by default."""


def all_gather(sizes: Sequence[int] = SIZES) -> None:
    """Time gathering a whole tensor of each size from equal shards."""
    here = context()

    def prepare(size: int) -> Callable[[], None]:
        shard, whole = _buffers(size)
        return lambda: here.world.all_gather(shard, whole)

    _table("All gather", sizes, prepare, bus=(here.world_size - 1) / here.world_size)


def time_all_gather(size: int) -> float:
    """Seconds that gathering a whole tensor of ``size`` bytes takes.  Collective."""
    shard, whole = _buffers(size)
    return _time(lambda: context().world.all_gather(shard, whole), repeat=5)


def reduce_scatter(sizes: Sequence[int] = SIZES) -> None:
    """Time adding up a whole tensor of each size over ranks, each rank keeping an equal shard."""
    here = context()

    def prepare(size: int) -> Callable[[], None]:
        shard, whole = _buffers(size)
        return lambda: here.world.reduce_scatter(whole, shard, "sum")

    _table("Reduce scatter", sizes, prepare, bus=(here.world_size - 1) / here.world_size)


def send_recv(sizes: Sequence[int] = SIZES) -> None:
    """Time sending a tensor of each size from rank 0 to rank 1.  Needs two ranks at least."""
    here = context()

    def prepare(size: int) -> Callable[[], None]:
        tensor = torch.zeros(size // 2, dtype=torch.float16, device=here.device.torch_device)
        if here.rank == 0:
            return lambda: here.world.send(tensor, 1)
        return (lambda: here.world.recv(tensor, 0)) if here.rank == 1 else (lambda: None)

    _table("Send and receive", sizes, prepare)


def _buffers(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    here = context()
    whole = round_up(size // 2, here.world_size)
    device = here.device.torch_device
    shard = torch.zeros(whole // here.world_size, dtype=torch.float16, device=device)
    return shard, torch.zeros(whole, dtype=torch.float16, device=device)


def _table(title: str, sizes: Sequence[int], prepare: Callable[[int], Callable[[], None]], bus: float = 1.0) -> None:
    """``bus``: the part of the bytes that comes to a rank, as in nccl-tests' bus bandwidth."""
    if context().rank == 0:
        print_block(title)
    print_rank(f"{'size':>10} {'time (ms)':>12} {'GB/s':>10} {'bus GB/s':>10}")
    for size in sizes:
        seconds = _time(prepare(size), repeat=3 if size >= 1 << 28 else 10)
        speed = size / seconds / 1e9
        print_rank(f"{_readable(size):>10} {seconds * 1e3:12.3f} {speed:10.3f} {bus * speed:10.3f}")


def _time(collective: Callable[[], None], repeat: int) -> float:
    """Seconds a call takes, between two moments at which all ranks have finished."""
    collective()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        collective()
    synchronize()
    return (time.perf_counter() - start) / repeat


def _readable(size: int) -> str:
    for unit, factor in (("GB", 30), ("MB", 20), ("KB", 10)):
        if size >= 1 << factor:
            return f"{size / (1 << factor):g} {unit}"
    return f"{size} B"
