"""The NCCL transport: every collective against values worked out in one process, with and without windows."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from bmtrain.comm import nccl
from bmtrain.comm.nccl import NcclCommunicator
from bmtrain.comm.staged import StagedCommunicator
from bmtrain.comm.watched import WatchedCommunicator
from bmtrain.device import Device
from bmtrain.errors import CommunicationError, ConfigurationError, DeviceError
from bmtrain.watch import Diary

GPUS = torch.cuda.device_count()
COUNT = 1000  # elements of one rank's share
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
ONLY_MOVED = [torch.int16, torch.complex64]

RANKS = max(GPUS, 2)  # on one GPU they share it

alone = pytest.mark.skipif(
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1, reason="other tests use the GPU's memory meanwhile"
)
own_gpus = pytest.mark.skipif(GPUS < 2, reason="depends on how NCCL moves bytes between GPUs, and needs two")


# ---- on the ranks


@lru_cache
def store() -> dist.Store:
    rank = int(os.environ["RANK"])
    return dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]), rank == 0)


@lru_cache
def communicator(policy: nccl.Policy = "default", staged: bool = False) -> NcclCommunicator:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    kind, name = (StagedCommunicator, "staged") if staged else (NcclCommunicator, f"test-{policy}")
    return kind(store(), name, rank, int(os.environ["WORLD_SIZE"]), device, policy=policy)


def values(rank: int, count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Small integers that differ by rank and place, and whose sums and products all these types hold exactly."""
    numbers = (torch.arange(count) * 7 + rank * 3) % 5 // 2
    return numbers.to(dtype).to(device)


def reduced(world: int, count: int, dtype: torch.dtype, op: str) -> torch.Tensor:
    """The ranks' values reduced in float64."""
    stacked = torch.stack([values(rank, count, torch.float64) for rank in range(world)])
    reduce = {"sum": torch.sum, "avg": torch.mean, "max": torch.amax, "min": torch.amin, "prod": torch.prod}[op]
    return reduce(stacked, 0).to(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same bytes (comparison of float8 is not implemented everywhere)."""
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def check_moves(dtype: torch.dtype, staged: bool = False) -> None:
    comm = communicator(staged=staged)
    mine = values(comm.rank, COUNT, dtype, comm.device)
    whole = torch.empty(comm.world_size * COUNT, dtype=dtype, device=comm.device)
    comm.all_gather(mine, whole)
    assert equal(whole, torch.cat([values(rank, COUNT, dtype) for rank in range(comm.world_size)]))
    for root in range(comm.world_size):
        tensor = values(comm.rank, COUNT, dtype, comm.device)
        comm.broadcast(tensor, root)
        assert equal(tensor, values(root, COUNT, dtype))
    following, previous = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    received = torch.empty_like(mine)
    with nccl.group():
        comm.send(mine, following)
        comm.recv(received, previous)
    assert equal(received, values(previous, COUNT, dtype))


def check_reductions(dtype: torch.dtype, ops: list[str], staged: bool = False) -> None:
    comm = communicator(staged=staged)
    whole_count = comm.world_size * COUNT
    for op in ops:
        tensor = values(comm.rank, COUNT, dtype, comm.device)
        comm.all_reduce(tensor, op)  # type: ignore[arg-type]
        assert equal(tensor, reduced(comm.world_size, COUNT, dtype, op)), ("all_reduce", op)
        shard = torch.empty(COUNT, dtype=dtype, device=comm.device)
        comm.reduce_scatter(values(comm.rank, whole_count, dtype, comm.device), shard, op)  # type: ignore[arg-type]
        expected = reduced(comm.world_size, whole_count, dtype, op)
        mine = slice(comm.rank * COUNT, (comm.rank + 1) * COUNT)
        assert equal(shard, expected[mine]), ("reduce_scatter", op)
        tensor = values(comm.rank, COUNT, dtype, comm.device)
        comm.reduce(tensor, comm.world_size - 1, op)  # type: ignore[arg-type]
        last = comm.rank == comm.world_size - 1
        assert equal(tensor, reduced(comm.world_size, COUNT, dtype, op) if last else values(comm.rank, COUNT, dtype))


def check_bool(staged: bool = False) -> None:
    comm = communicator(staged=staged)
    for op, expected in (("sum", torch.any), ("max", torch.any), ("min", torch.all), ("prod", torch.all)):
        tensor = values(comm.rank, COUNT, torch.bool, comm.device)
        comm.all_reduce(tensor, op)  # type: ignore[arg-type]
        stacked = torch.stack([values(rank, COUNT, torch.bool) for rank in range(comm.world_size)])
        assert torch.equal(tensor.cpu(), expected(stacked, dim=0)), op
    check_moves(torch.bool, staged)


def check_staged_memory() -> None:
    """What arrives in several parts is whole, on two streams in turn, in any mode, and nothing is connected for it."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    communicator().barrier()
    check_moves(torch.float32)  # what NCCL and torch load on first use is loaded by now
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    comm = StagedCommunicator(store(), "memory", rank, world, device)
    count = 3_000_001
    shard = torch.arange(count, dtype=torch.float32, device=device) + rank * 0.25
    whole = torch.empty(world * count, device=device)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for turn in range(6):
        with torch.inference_mode(turn == 0), torch.cuda.stream(side if turn % 2 else torch.cuda.default_stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream() if turn % 2 else side)
            comm.all_gather(shard, whole)
            total = torch.full((3,), float(rank + turn), device=device)
            comm.all_reduce(total)
        torch.cuda.synchronize()
        expected = torch.arange(count, dtype=torch.float32).repeat(world, 1) + torch.arange(world).view(-1, 1) * 0.25
        assert torch.equal(whole.cpu(), expected.flatten())
        assert total.tolist() == [sum(r + turn for r in range(world))] * 3
        whole.zero_()
    assert free - torch.cuda.mem_get_info()[0] < 100 << 20
    comm.close()


def check_windows(policy: nccl.Policy, dtype: torch.dtype, count: int) -> bool:
    """Collectives between windows give the bytes that ordinary memory gives.  Returns whether windows were opened."""
    comm, plain = communicator(policy), communicator()
    shard, whole = comm.alloc(count, dtype), comm.alloc(count * comm.world_size, dtype, comm.device)
    torch.manual_seed(comm.rank)
    shard.copy_(torch.randn(count))
    plain_whole = torch.empty_like(whole)
    comm.all_gather(shard, whole)
    plain.all_gather(shard.clone(), plain_whole)
    assert torch.equal(whole, plain_whole)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        whole.zero_()
        comm.all_gather(shard, whole)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(whole, plain_whole)
    whole.copy_(values(comm.rank, whole.numel(), dtype))
    comm.reduce_scatter(whole, shard)
    expected = reduced(comm.world_size, whole.numel(), dtype, "sum")
    assert torch.equal(shard.cpu(), expected[comm.rank * count : (comm.rank + 1) * count])
    part = whole[: 3 * comm.world_size]  # views and parts of a window work as the whole does
    comm.all_gather(shard[5:8], part)
    assert torch.equal(part[3 * comm.rank : 3 * comm.rank + 3], shard[5:8])
    opened = [plain.register(whole)]  # a second window on the same memory, or the same one again
    plain.all_reduce(whole)
    opened += [comm.release(shard), comm.release(whole), comm is plain or plain.release(whole)]
    assert not comm.release(whole) and not plain.release(whole)
    return all(opened)


def check_memory_returns() -> None:
    comm = communicator("zero")
    buffer = comm.alloc(1 << 20, torch.float32)
    comm.release(buffer)
    del buffer
    comm.barrier()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        buffer = comm.alloc(1 << 28, torch.uint8)
        buffer.fill_(7)
        view = buffer[100:200].view(torch.int32)
        comm.release(buffer)
        del buffer
        gc.collect()
        assert view.unique().tolist() == [0x07070707]  # a view keeps the memory
        del view
    torch.cuda.synchronize()
    comm.barrier()
    assert torch.cuda.mem_get_info()[0] >= before - (32 << 20)


def check_copy_engines() -> list[str]:
    """The device activities of one all-gather between windows of a zero-CTA communicator."""
    comm = communicator("zero")
    shard, whole = comm.alloc(1 << 22, torch.bfloat16), comm.alloc(comm.world_size << 22, torch.bfloat16)
    comm.all_gather(shard, whole)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        comm.all_gather(shard, whole)
        torch.cuda.synchronize()
    comm.release(shard), comm.release(whole)
    return sorted({event.name for event in profile.events()})


def check_refusals() -> None:
    comm = communicator()
    device = comm.device
    shard = torch.zeros(4, device=device)
    whole = torch.zeros(4 * comm.world_size, device=device)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("needs a whole", lambda: comm.all_gather(shard, whole[:-1])),
        ("needs a whole", lambda: comm.all_gather(shard, whole.half())),
        ("needs a whole", lambda: comm.reduce_scatter(whole, shard.half())),
        ("contiguous", lambda: comm.all_reduce(whole[::2])),
        ("not on cpu", lambda: comm.all_reduce(torch.zeros(3, device="cpu"))),
        ("not on cpu", lambda: comm.all_gather(torch.zeros(4, device="cpu"), whole)),
        ("does not exist", lambda: comm.broadcast(shard, comm.world_size)),
        ("does not exist", lambda: comm.send(shard, -1)),
        ("cannot reduce torch.int16", lambda: comm.all_reduce(shard.short())),
        ("cannot reduce torch.bool", lambda: comm.all_reduce(shard.bool(), "avg")),
        ("cannot reduce torch.float32", lambda: comm.all_reduce(shard, "median")),  # type: ignore[arg-type]
        ("Only memory from alloc", lambda: comm.register(shard)),
    ]
    for text, call in refused:
        with pytest.raises(CommunicationError, match=text):
            call()
    with pytest.raises(DeviceError, match="There is no cuda:99"):
        NcclCommunicator(store(), "x", 0, 1, torch.device("cuda", 99))
    with pytest.raises(DeviceError, match="There is no cuda:99"):
        comm.alloc(4, torch.float32, torch.device("cuda", 99))
    with pytest.raises(ConfigurationError, match="policy"):
        NcclCommunicator(store(), "x", 0, 1, device, policy="fast")  # type: ignore[arg-type]
    comm.check_async_error()
    comm.all_reduce(whole)  # the refusals left it usable
    comm.barrier()


def check_names_and_close() -> None:
    world = communicator()
    for _ in range(2):  # a name may be used again
        comm = NcclCommunicator(store(), "again", world.rank, world.world_size, world.device)
        tensor = torch.ones(3, device=world.device)
        comm.all_reduce(tensor)
        assert tensor.tolist() == [world.world_size] * 3
        comm.close()
        comm.close()
        with pytest.raises(CommunicationError, match="closed"):
            comm.all_reduce(tensor)
    part = world.split(world.rank % 2, -world.rank)
    assert part is not None
    members = list(range(world.rank % 2, world.world_size, 2))[::-1]
    assert part.world_size == len(members) and members[part.rank] == world.rank
    tensor = torch.tensor([world.rank], device=world.device)
    part.all_reduce(tensor)
    assert tensor.item() == sum(members)
    part.close()
    nobody = world.split(None if world.rank == 0 else 1, 0)
    assert (nobody is None) == (world.rank == 0)
    if nobody is not None:
        nobody.close()


def check_abort() -> None:
    comm = communicator()
    tensor = torch.ones(1 << 20, device=comm.device)
    comm.all_reduce(tensor)
    torch.cuda.synchronize()
    if comm.rank == 0:
        comm.all_reduce(tensor)  # nobody joins
        assert not torch.cuda.current_stream().query()
    comm.abort()
    torch.cuda.synchronize()  # returns only because the collective was ended
    with pytest.raises(CommunicationError, match="aborted"):
        comm.all_reduce(tensor)
    comm.close()


def count_warnings() -> int:
    """How often the lack of windows is mentioned."""
    comm = communicator()
    comm._handle = WithoutWindows(comm._handle)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        buffers = [comm.alloc(100, torch.float32) for _ in range(3)]
    for buffer in buffers:
        buffer.fill_(1.0)
        comm.all_reduce(buffer)
        assert buffer.unique().tolist() == [comm.world_size]
    return sum("symmetric windows" in str(warning.message) for warning in caught)


class WithoutWindows:
    """A communicator on which NCCL opens no window."""

    def __init__(self, handle: object) -> None:
        self.handle = handle

    def __getattr__(self, name: str) -> object:
        return getattr(self.handle, name)

    def register_window(self, address: int) -> str:
        return "for the test"


def on_gpus(function: Callable[..., Any], *args: object, fresh: bool = False) -> list[Any]:
    """The results of calling ``function`` in one process for each GPU, two at least."""
    return run_ranks(RANKS, function, *args, initialize=False, fresh=fresh, timeout=60)


# ---- the tests


@pytest.mark.gpu
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + FLOAT8 + ONLY_MOVED)
def test_moves(dtype: torch.dtype, staged: bool) -> None:
    on_gpus(check_moves, dtype, staged)


@pytest.mark.gpu
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + FLOAT8)
def test_reductions(dtype: torch.dtype, staged: bool) -> None:
    ops = ["sum", "max", "min", "prod"] + (["avg"] if dtype in FLOATS and RANKS in (2, 4, 8) else [])
    on_gpus(check_reductions, dtype, ops, staged)


@pytest.mark.gpu
@pytest.mark.parametrize("staged", [False, True])
def test_bool(staged: bool) -> None:
    on_gpus(check_bool, staged)


@pytest.mark.gpu
@own_gpus
@alone
@pytest.mark.skipif(GPUS > 1 and nccl.available() and nccl.version() < 22700, reason="needs windows")
def test_staged_collectives_need_little_memory() -> None:
    on_gpus(check_staged_memory)


@pytest.mark.gpu
@own_gpus
@pytest.mark.parametrize("policy", ["default", "efficiency", "zero"])
@pytest.mark.parametrize("dtype, count", [(torch.bfloat16, 1 << 20), (torch.float32, 1 << 20), (torch.float32, 1000)])
def test_windows_equal_ordinary_memory(policy: nccl.Policy, dtype: torch.dtype, count: int) -> None:
    opened = on_gpus(check_windows, policy, dtype, count)
    assert opened == [nccl.version() >= 22700] * RANKS


@pytest.mark.gpu
@own_gpus
@alone
def test_memory_returns() -> None:
    on_gpus(check_memory_returns)


@pytest.mark.gpu
@own_gpus
@pytest.mark.skipif(GPUS > 1 and nccl.available() and nccl.version() < 22800, reason="needs NCCL 2.28")
def test_zero_policy_moves_by_copy_engines() -> None:
    for names in on_gpus(check_copy_engines):
        assert any("PtoP" in name for name in names), names
        assert not any("ncclDevKernel_AllGather" in name for name in names), names


@pytest.mark.gpu
def test_refusals() -> None:
    on_gpus(check_refusals)


@pytest.mark.gpu
def test_names_split_and_close() -> None:
    on_gpus(check_names_and_close)


@pytest.mark.gpu
def test_abort_ends_a_collective_that_nobody_joins() -> None:
    on_gpus(check_abort, fresh=True)


@pytest.mark.gpu
def test_missing_windows_are_mentioned_once() -> None:
    assert on_gpus(count_warnings, fresh=True) == [1] + [0] * (RANKS - 1)


@pytest.mark.gpu
def test_one_rank_is_a_group_too() -> None:
    comm = NcclCommunicator(dist.HashStore(), "alone", 0, 1, torch.device("cuda"))
    tensor, whole = torch.arange(10.0, device="cuda"), torch.empty(10, device="cuda")
    comm.all_gather(tensor, whole)
    comm.all_reduce(whole)
    comm.broadcast(whole, 0)
    comm.reduce_scatter(whole, tensor, "avg")
    comm.barrier()
    assert tensor.tolist() == list(range(10))
    buffer = comm.alloc(5, torch.int64)
    assert buffer.shape == (5,) and buffer.dtype == torch.int64 and buffer.device == comm.device
    comm.close()


@pytest.mark.gpu
@alone
def test_arena_lives_as_long_as_a_tensor_on_it() -> None:
    from bmtrain import _C

    assert nccl.version() >= 21900, "arenas came with NCCL 2.19"
    torch.zeros(1, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    arena = _C.nccl.Arena(bytes=1 << 28, device=torch.cuda.current_device())
    tensor = torch.utils.dlpack.from_dlpack(arena.to_dlpack())
    unused = arena.to_dlpack()
    assert tensor.data_ptr() == arena.address and tensor.numel() == arena.bytes == 1 << 28
    tensor.fill_(3)
    part = tensor[1000:1010]
    del arena, tensor, unused
    gc.collect()
    assert part.tolist() == [3] * 10
    del part
    gc.collect()
    assert torch.cuda.mem_get_info()[0] >= before - (4 << 20)


@pytest.mark.gpu
def test_nccl_reports_its_own_errors_with_place_and_text() -> None:
    from bmtrain import _C

    nccl.version()
    with pytest.raises(CommunicationError, match=r"NCCL: .*csrc/nccl/communicator\.cpp:\d+"):
        _C.nccl.Communicator(id=_C.nccl.unique_id(), rank=5, world_size=1, policy=0)
    with pytest.raises(CommunicationError, match="128 bytes"):
        _C.nccl.Communicator(id=b"short", rank=0, world_size=1, policy=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert not nccl.available()
    with pytest.raises(DeviceError, match="GPU"):
        NcclCommunicator(dist.HashStore(), "none", 0, 1, torch.device("cuda", 0))


def test_cpu_device_is_refused() -> None:
    with pytest.raises(DeviceError, match="cpu"):
        NcclCommunicator(dist.HashStore(), "none", 0, 1, torch.device("cpu"))


def test_rank_must_be_in_the_group() -> None:
    with pytest.raises(ConfigurationError, match="Rank 2"):
        NcclCommunicator(dist.HashStore(), "none", 2, 2, torch.device("cuda", 0))


class Gone:
    """A communicator of the compiled part, one of whose ranks is gone."""

    def all_reduce(self, **arguments: int) -> None:
        raise CommunicationError("NCCL: remote process exited")


def test_what_nccl_finds_while_queueing_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog knows who it was; only what was refused before NCCL was asked goes on as it is."""
    comm: Any = object.__new__(NcclCommunicator)
    comm.rank, comm.world_size, comm.device, comm.policy, comm._handle = 0, 2, torch.device("cpu"), "default", Gone()
    monkeypatch.setattr(nccl, "current_stream_handle", lambda index: 1)
    monkeypatch.setattr(nccl, "library", SimpleNamespace(type_code=lambda _: 0, op_code=lambda *_: 0))
    watchdog: Any = SimpleNamespace(verdict=None, explained=lambda error: CommunicationError(f"Rank 1: {error}"))
    watched = WatchedCommunicator(comm, "world", Diary(), watchdog, Device(torch.device("cpu")).waits)
    with pytest.raises(CommunicationError, match=r"^Rank 1: NCCL: remote process exited$"):
        watched.all_reduce(torch.ones(2))
    with pytest.raises(CommunicationError, match=r"^This communicator moves"):
        watched.all_reduce(torch.ones(2, device="meta"))
