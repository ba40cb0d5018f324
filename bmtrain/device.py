"""Streams, events and memory.  The one place that asks whether this is a GPU.

On a CPU every operation is finished when its call returns, so streams and events are empty there.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .errors import DeviceError
from .own_random import HostDraws, HostState, OfNumpy, OwnRandom, SharedDraws, host_draws_own, move_on

Schedule = Literal["overlap", "serial", "stress"]
"""How collectives run beside computation: at the same time; one after the other, to find out whether a difference comes
from their order; or at the same time with delays around every event and freed buffers overwritten with NaN, so
that a missing wait shows in the numbers."""

RngState = tuple[torch.Tensor, "torch.Tensor | None", HostState, list[int]]

# The first name whose words are among a GPU's counts.
_PEAKS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12,
    "A800": 312e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
_MARKS_KEPT = 1024  # pairs of events on their way; the oldest of so many has long been passed
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED
_STRESS_CYCLES = 2_000_000  # about a millisecond: longer than any kernel of a small test


class Event:
    """A point on a stream that another stream can wait for."""

    def __init__(self, cuda: bool, waits: Waits, stress: bool = False) -> None:
        self._waits, self._stress = waits, stress
        self._event: torch.cuda.Event | None = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def record(self, stream: torch.cuda.Stream | None = None) -> None:
        """Mark the present end of ``stream`` (default: the current one)."""
        if self._event is not None:
            if self._stress:
                _delay(stream)
            self._event.record(stream)

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Let later work of ``stream`` (default: the current one) run only after the recorded point."""
        if self._event is not None:
            with self._waits.at(stream):
                self._event.wait(stream)
            if self._stress:
                _delay(stream)

    def synchronize(self) -> None:
        """Return when the device has passed the recorded point."""
        if self._event is not None:
            self._event.synchronize()


class Readback:
    """One number on its way from the device to the host."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number, self._event = number, None
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True, device="cpu")
            self._number.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def comes_later(self) -> bool:
        """Whether the device computes it while the host goes on: the same on all ranks, unlike whether it is there."""
        return self._event is not None

    def get(self) -> float:
        """The number; waits until the device has computed it."""
        if self._event is not None:
            self._event.synchronize()
        return self._number.item()


class Stopwatch:
    """How long the host takes to queue some work, and the device to do it.  Runs from the time that it is made."""

    def __init__(self, device: Device) -> None:
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.is_cuda else []  # type: ignore[no-untyped-call]
        self._began, self._ended = time.perf_counter(), 0.0
        self._mark(0)

    def _mark(self, number: int) -> None:
        if self._marks:
            self._marks[number].record()

    def stop(self) -> None:
        """The work is queued."""
        self._ended = time.perf_counter()
        self._mark(1)

    def read(self) -> tuple[float, float] | None:
        """The host's seconds, and the device's; None as long as one of them is at work."""
        if not self._ended:
            return None
        host = self._ended - self._began
        if not self._marks:
            return host, host
        if not all(mark.query() for mark in self._marks):  # type: ignore[no-untyped-call]
            return None
        return host, self._marks[0].elapsed_time(self._marks[1]) / 1000


class _OnStream:
    """Work inside the ``with`` is queued on ``stream``, later work on ``before``.  Made often, so no generator."""

    __slots__ = ("before", "stream")

    def __init__(self, stream: torch.cuda.Stream, before: Any) -> None:
        self.stream, self.before = stream, before

    def __enter__(self) -> None:
        torch.cuda.set_stream(self.stream)

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_stream(self.before)


_NOWHERE = nullcontext()


class Recorder:
    """Records device work, so that one call queues all of it again: as CUDA graphs, which share memory of their own.

    Recording runs the host's part of the work, and nothing on the device.  What the work made lies where it lies for
    good, as long as somebody holds it, and has values once the work was queued.  Where nothing can be recorded the
    call is the work itself, which makes everything anew.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle() if device.is_cuda else None

    @property
    def is_real(self) -> bool:
        """Whether what the work makes lies where it was when that was recorded."""
        return self._device.is_cuda

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What queues ``work`` on the current stream.  Whatever ``work`` raises is raised, and nothing is recorded."""
        if not self._device.is_cuda:
            return work
        before, graph = torch.cuda.current_stream(self._device.torch_device), torch.cuda.CUDAGraph()
        # Other threads (a watchdog, a loader that pins memory) go on asking the device.
        recording = torch.cuda.graph(graph, self._pool, self._device.recording_stream(), "thread_local")
        try:
            with recording:
                work()
        except BaseException:
            torch.cuda.set_stream(before)
            self._recover()
            raise
        return graph.replay

    def _recover(self) -> None:
        """What torch leaves undone where a recording failed: its allocator and its generator go on recording."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.torch_device.index, self._pool)
        stream = self._device.recording_stream()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), None, stream, "thread_local"):
            torch.zeros((), device=self._device.torch_device)


class Waits:
    """How long computation has waited for other ranks; measured from the time that somebody wants to know.

    On a CPU that is the time inside collectives.  On a GPU it is how long the stream that computes stood still: for the
    event of a collective on another stream, in a collective of its own, or since the host waited and queued nothing.

    Attributes:
        is_on: whether it is measured.
    """

    def __init__(self, device: Device) -> None:
        self.is_on = False
        self._device = device
        self._inside, self._seconds = 0, 0.0
        self._began: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._unused: list[torch.cuda.Event] = []

    def at(self, stream: torch.cuda.Stream | None = None) -> AbstractContextManager[object]:
        """Inside the ``with`` the host, or ``stream`` (default: the current one), may wait for other ranks."""
        if not self.is_on:
            return _NOWHERE
        device = self._device
        if device.is_cuda and not self._inside:
            self._stream = stream or device.current_stream()
            if self._stream in (device.gather_stream, device.reduce_stream):
                return _NOWHERE
        return self

    def __enter__(self) -> None:
        self._inside += 1
        if self._inside == 1:
            self._began = self._mark() if self._device.is_cuda else time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._inside -= 1
        if self._inside or self._began is None:
            return
        if self._device.is_cuda:
            self._marks.append((self._began, self._mark()))
            if len(self._marks) > _MARKS_KEPT:
                self._add_oldest()
        else:
            self._seconds += time.perf_counter() - self._began
        self._began = None

    def _mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def _add_oldest(self) -> None:
        began, ended = self._marks.popleft()
        ended.synchronize()
        self._seconds += began.elapsed_time(ended) / 1000
        self._unused += (began, ended)

    def seconds(self) -> float:
        """All of it so far.  Call it outside of collectives; waits for the device."""
        self._inside, self._began = 0, None
        while self._marks:
            self._add_oldest()
        return self._seconds


def current_stream_handle(index: int) -> int:
    """The cudaStream_t on which work for GPU ``index`` is queued now, as C++ takes it."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def _delay(stream: torch.cuda.Stream | None) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_STRESS_CYCLES)  # type: ignore[no-untyped-call]


@dataclass
class Memory:
    """What a device says of its memory, in bytes; ``retries``: how often its allocator had to free what it kept."""

    free: int
    allocated: int
    total: int
    peak: int
    retries: int = 0


class Device:
    """One process's compute device.

    Attributes:
        stand_in: what to say of memory in the place of the device; None for the truth, which a CPU does not know.
        waits: how long computation has waited for other ranks.
        gather_waits: the same for gathers of parameters alone.
    """

    def __init__(self, device: torch.device, schedule: Schedule = "overlap", rank: int = 0) -> None:
        self.stand_in: Memory | None = None
        self.torch_device = device
        self.is_cuda = device.type == "cuda"
        self.schedule = schedule
        self._index = device.index  # looked up fastest
        self._draws_as = rank
        self._own_random = [OwnRandom(generator, rank) for generator in self._generators()]
        self._host_draws: HostDraws | None = None
        self._numpy = OfNumpy()
        self._streams: dict[int, torch.cuda.Stream] = {}
        self.gather_stream = self._side_stream()
        self.reduce_stream = self._side_stream()
        self._recording_stream: torch.cuda.Stream | None = None
        self.waits, self.gather_waits = Waits(self), Waits(self)

    def tell_where(self, error: RuntimeError) -> None:
        """Add to torch's error about devices that differ which one is this rank's, and how batches get there."""
        differ = re.search(r"same device|weight type \(torch\.cuda", str(error))
        if differ and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"bmtrain: this rank's model is on {self.torch_device}; batches get there by .to('cuda') or "
                "bmt.to_device(batch). A script that names 'cuda:0' begins with `import bmtrain.own_gpu`; one that "
                "trains on CPUs, with bmt.init_distributed(device='cpu')."
            )

    def recording_stream(self) -> torch.cuda.Stream:
        """The one on which work is recorded: always the same, so that libraries have their memory for it once."""
        if self._recording_stream is None:
            self._recording_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        return self._recording_stream

    def _side_stream(self) -> torch.cuda.Stream | None:
        # High priority: a collective that waits behind a GEMM's thread blocks starts too late to overlap the next.
        if not self.is_cuda or self.schedule == "serial":
            return None
        return torch.cuda.Stream(self.torch_device, priority=-1)  # type: ignore[no-untyped-call]

    def copy_stream(self) -> torch.cuda.Stream | None:
        """A new one, for copies between device and host."""
        return self._side_stream()

    def event(self) -> Event:
        """A new event, not yet recorded."""
        return Event(self.is_cuda, self.waits, self.schedule == "stress")

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[None]:
        """Run the body's device work on ``stream``."""
        return _NOWHERE if stream is None else _OnStream(stream, self.current_stream())

    def event_after(self, stream: torch.cuda.Stream | None) -> Event:
        """An event recorded at the present end of ``stream``."""
        event = self.event()
        event.record(stream)
        return event

    def current_stream(self) -> torch.cuda.Stream | None:
        """The stream on which the caller computes."""
        if not self.is_cuda:
            return None
        # Asked dozens of times a step: torch.cuda.current_stream makes a new object each time, some 10 us.
        handle = current_stream_handle(self._index)
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = torch.cuda.current_stream(self._index)
        return stream

    @property
    def records(self) -> bool:
        """Whether work can be recorded, to be queued again by one call; a CPU stands in for that under "stress"."""
        return self.is_cuda or self.schedule == "stress"

    def recorder(self) -> Recorder:
        """Of work that shares memory."""
        return Recorder(self)

    def stopwatch(self) -> Stopwatch:
        """One that runs."""
        return Stopwatch(self)

    def watch_gathers(self) -> Waits:
        """How long computation waits for gathers of parameters from now on, until ``is_on`` is set to False."""
        self.gather_waits = Waits(self)
        self.gather_waits.is_on = True
        return self.gather_waits

    @contextmanager
    def host_waits(self) -> Iterator[list[str]]:
        """In the list, after the body: where it made the host wait for the device, which cannot be recorded."""
        found: list[str] = []
        if not self.is_cuda:
            yield found
            return
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                found.append(f"{warning.filename}:{warning.lineno}")
            elif "Synchronization debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def keep_for_current_stream(self, tensor: torch.Tensor) -> None:
        """Let the memory of ``tensor``, made on another stream, be used again only after the work queued so far."""
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self.torch_device))

    def read_later(self, number: torch.Tensor) -> Readback:
        """Bring a 0-d tensor to the host behind the present end of the current stream."""
        return Readback(number)

    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast region the caller is in, if it is in one."""
        kind = self.torch_device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def synchronize(self) -> None:
        """Wait until all queued device work is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """CPU memory for values like these, to which a GPU copies while it goes on."""
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=self.is_cuda)

    @contextmanager
    def reading(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Let this thread read from the device while others compute, on a stream of its own.

        What is yielded gives values on the CPU, which last until it is called again.  They come through pinned memory:
        while the driver copies to other memory, it may keep others from launching kernels.
        """
        buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

        def read(values: torch.Tensor) -> torch.Tensor:
            nonlocal buffer
            if not (values.is_cuda or self.schedule == "stress"):
                return values
            size = values.numel() * values.element_size()
            if buffer.numel() < size:
                buffer = self.host_buffer(torch.empty(size, dtype=torch.uint8, device="meta"))
            out = buffer[:size].view(values.dtype).view(values.shape)
            out.copy_(values, non_blocking=True)
            stream = self.current_stream()  # this device's, whatever device a new thread is on
            if stream is not None:
                stream.synchronize()
            return out

        with self.on(self.copy_stream()):
            yield read

    def is_busy(self) -> bool:
        """Whether queued device work is still to be done.  For any thread."""
        if not self.is_cuda:
            return False
        streams = (self.gather_stream, self.reduce_stream, torch.cuda.default_stream(self.torch_device))
        try:
            return not all(stream is None or stream.query() for stream in streams)
        except RuntimeError:  # an error of the device, which is raised where somebody waits for it
            return True

    @property
    def is_captured(self) -> bool:
        """Whether what is queued now goes into a CUDA graph instead of being run."""
        return self.is_cuda and torch.cuda.is_current_stream_capturing()

    @property
    def overlaps(self) -> bool:
        """Whether collectives may run beside computation; on a CPU none do, but under "stress" they begin as early."""
        return self.is_cuda or self.schedule == "stress"

    @property
    def reuses_memory(self) -> bool:
        """Whether buffers that go back are used again while views of them may live; a CPU does so under "stress"."""
        return self.is_cuda or self.schedule == "stress"

    @property
    def is_apart(self) -> bool:
        """Whether its memory is not the host's; a CPU's counts as such under "stress"."""
        return self.is_cuda or self.schedule == "stress"

    @property
    def measures_memory(self) -> bool:
        """Whether ``memory`` can tell what a step leaves free."""
        return self.is_cuda or self.stand_in is not None

    def memory(self) -> Memory:
        """Bytes that could be allocated now, that are allocated, of the whole device, and the most allocated so far."""
        if self.stand_in is not None:
            return self.stand_in
        free, total = torch.cuda.mem_get_info(self.torch_device)
        allocated = torch.cuda.memory_allocated(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - allocated
        return Memory(free + cached, allocated, total, self.peak_memory(), self.allocation_retries())

    def peak_memory(self) -> int:
        """The most bytes that were allocated at a time since the user last asked to forget it."""
        if self.stand_in is not None:
            return self.stand_in.peak
        return torch.cuda.max_memory_allocated(self.torch_device)

    def allocation_retries(self) -> int:
        """How often the allocator had to free what it kept, and only then found memory."""
        if self.stand_in is not None:
            return self.stand_in.retries
        return int(torch._C._cuda_memoryStats(self._index)["num_alloc_retries"]) if self.is_cuda else 0

    def peak_flops(self) -> float:
        """FLOP/s in bf16, or fp16 where there is no bf16, dense, as NVIDIA gives them; 0 where that is not known."""
        name = torch.cuda.get_device_name(self.torch_device) if self.is_cuda else ""
        return next((flops for part, flops in _PEAKS.items() if re.search(rf"\b{part}\b", name)), 0.0)

    def empty_cache(self) -> None:
        """Give memory that torch's allocator keeps and nobody uses back to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def _generators(self) -> list[torch.Generator]:
        """Torch's, that of this device first."""
        if not self.is_cuda:
            return [torch.default_generator]
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return [torch.cuda.default_generators[self._index], torch.default_generator]

    @property
    def decides_apart(self) -> bool:
        """Whether layers draw from another generator than Python code that decides which of them run."""
        return self.is_cuda

    @property
    def generator(self) -> torch.Generator:
        """What layers draw from."""
        return self._generators()[0]

    def watch_shared_draws(self, watched: bool) -> SharedDraws | None:
        """Look at what is drawn from the shared stream of what layers draw from, or no more."""
        own = self._own_random[0]
        own.watched = SharedDraws(self.generator, is_paused=own.depth > 0) if watched else None
        return own.watched

    def watch_host_draws(self, watched: bool) -> HostDraws | None:
        """The same for what ``random`` and numpy draw."""
        self._host_draws = HostDraws() if watched else None
        return self._host_draws

    def layers_draw_own(self) -> AbstractContextManager[None]:
        """Inside the ``with`` this rank's layers draw numbers of their own."""
        return self._own_random[0]

    @contextmanager
    def all_draw_own(self) -> Iterator[None]:
        """Inside the ``with`` whatever torch, ``random`` and numpy draw on this rank is its own."""
        with ExitStack() as stack:
            for own in self._own_random:
                stack.enter_context(own)
            stack.enter_context(_paused(self._host_draws))
            stack.enter_context(host_draws_own(self._draws_as))
            yield

    def rng_state(self) -> RngState:
        """State of torch's CPU generator, this device's, ``random`` and numpy, and who draws from an own stream."""
        here = torch.cuda.get_rng_state(self.torch_device) if self.is_cuda else None
        return torch.get_rng_state(), here, HostState.now(self._numpy), [own.depth for own in self._own_random]

    def drawn_since(self, state: RngState) -> list[bool]:
        """Of torch's generators, that of this device first, of ``random`` and numpy: whether they have moved."""
        present = self.rng_state()
        pairs = [(old, new) for old, new in ((state[1], present[1]), (state[0], present[0])) if old is not None]
        return [*(new is None or not torch.equal(old, new) for old, new in pairs), *state[2].left_by(present[2])]

    def go_back_to(self, start: RngState, drawn: Sequence[bool]) -> None:
        """Put the shared streams where they were, and those that have ``drawn`` somewhere that follows from it alone.

        Generators that draw from own streams now are left alone.
        """
        states = [state for state in (start[1], start[0]) if state is not None]
        for generator, own, state, moves in zip(self._generators(), self._own_random, states, drawn, strict=False):
            if not own.depth:
                generator.set_state(state)
                if moves:
                    move_on(generator)
        start[2].move_on(drawn[-2:])

    def set_rng_state(self, state: RngState) -> None:
        """Put back what ``rng_state`` returned."""
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.torch_device)
        state[2].put_back(self._numpy)
        for own, depth in zip(self._own_random, state[3], strict=True):
            own.depth = depth


@contextmanager
def _paused(draws: HostDraws | None) -> Iterator[None]:
    """What is drawn inside the ``with`` is not counted."""
    if draws is not None:
        draws.look()
    yield
    if draws is not None:
        draws.begin_here()


AutocastRegions = list[tuple[str, bool, torch.dtype]]


def autocast_regions() -> AutocastRegions:
    """For each type of device: whether autocast is on, and its dtype."""
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


@contextmanager
def in_autocast_regions(regions: AutocastRegions) -> Iterator[None]:
    """Run the body as inside the regions that ``autocast_regions`` found."""
    with ExitStack() as stack:
        for kind, enabled, dtype in regions:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.amp.autocast(kind, dtype=dtype, enabled=enabled))
        yield


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine; memory in bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]


def processors() -> int:
    """How many of the host's this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[Gpu]:
    """Every GPU that this process may use; none on a machine without."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(properties.name, total, free, (properties.major, properties.minor)))
    return found


def is_in_use() -> bool:
    """Whether this process has used a GPU already, so that its libraries have read the environment."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def choose_deterministic_algorithms() -> None:
    """Let torch and cuDNN choose algorithms that give the same bits each time; where there is none, it is an error."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it would choose by time


def let_segments_grow() -> None:
    """Let torch's allocator extend its segments instead of adding others, so that it reserves little more than is used.

    Memory already reserved stays as it is.
    """
    name = "_accelerator_setAllocatorSettings"
    if not hasattr(torch._C, name):  # torch < 2.10
        name = "_cuda_cudaCachingAllocator_set_allocator_settings"
    getattr(torch._C, name)("expandable_segments:True")


_SEEN = "BMTRAIN_GPU"
"""What ``see_own_gpu`` set CUDA_VISIBLE_DEVICES to: kept in the environment, which workers of loaders get, too."""


def see_own_gpu() -> None:
    """Hide all GPUs of this host from this process but that of its local rank, which is ``cuda:0`` from then on.

    A script that names its GPU (``torch.device("cuda:0")``, ``.cuda(0)``) then names on each rank its own. Does nothing
    where this process is alone on its host, where there are fewer GPUs than ranks, and a second time.

    Raises DeviceError where CUDA was asked before which GPUs there are: that cannot be changed any more.
    """
    env = os.environ
    local_rank, visible = int(env.get("LOCAL_RANK", "0")), env.get("CUDA_VISIBLE_DEVICES")
    if _SEEN in env or torch.version.cuda is None or int(env.get("LOCAL_WORLD_SIZE", "1")) < 2:
        return
    started = _cuda_has_started()
    if torch.cuda.device_count() <= local_rank:
        return  # no GPUs, or too few: choose_device says so
    if started or _cuda_has_started():
        raise DeviceError(
            "CUDA was used before this rank could choose its GPU: let `import bmtrain.own_gpu` be the first line of "
            "the script that torchrun starts."
        )
    env[_SEEN] = env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank].strip() if visible else str(local_rank)


def _cuda_has_started() -> bool:
    """Whether this process's CUDA has read the environment.  The driver says so; ``torch.cuda`` would start it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED)


def choose_device(asked: str | None, local_rank: int) -> torch.device:
    """The device of the process with this local rank: its GPU when there are GPUs, else the CPU.

    Raises DeviceError when ``asked`` is "cuda" and no GPU is there for this local rank, and when the GPU that
    ``see_own_gpu`` chose was taken back.
    """
    if asked not in (None, "cpu", "cuda"):
        raise DeviceError(f"device must be 'cpu', 'cuda' or None, not {asked!r}.")
    if asked == "cpu":
        return torch.device("cpu")
    own, visible = os.environ.get(_SEEN), os.environ.get("CUDA_VISIBLE_DEVICES")
    if own is not None and own != visible:
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, but this rank's GPU is {own!r}: set it at the launch only, as in "
            "CUDA_VISIBLE_DEVICES=2,3 torchrun ..."
        )
    if asked is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "device='cuda' was asked for, but torch sees no GPU here. Leave device out to run on the CPU."
        )
    count = torch.cuda.device_count()
    index = local_rank if own is None else 0
    if index >= count:
        raise DeviceError(
            f"Local rank {local_rank} has no GPU: this machine shows {count}. "
            f"Start at most {count} processes here, or pass device='cpu'."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
