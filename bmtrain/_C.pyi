"""Types of the compiled extension (csrc/).  Addresses and streams are integers, passed by name."""

from collections.abc import Sequence
from types import ModuleType

with_cuda: bool

class _Communicator:
    def __init__(self, *, id: bytes, rank: int, world_size: int, policy: int) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    def all_gather(self, *, shard: int, whole: int, count: int, dtype: int, stream: int) -> None: ...
    def reduce_scatter(self, *, whole: int, shard: int, count: int, dtype: int, op: int, stream: int) -> None: ...
    def all_reduce(self, *, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None: ...
    def broadcast(self, *, source: int, target: int, count: int, dtype: int, root: int, stream: int) -> None: ...
    def reduce(self, *, source: int, target: int, count: int, dtype: int, op: int, root: int, stream: int) -> None: ...
    def send(self, *, data: int, count: int, dtype: int, peer: int, stream: int) -> None: ...
    def recv(self, *, data: int, count: int, dtype: int, peer: int, stream: int) -> None: ...
    def register_window(self, address: int) -> str: ...
    def deregister_window(self, address: int) -> bool: ...
    def split(self, *, color: int, key: int, policy: int) -> _Communicator | None: ...
    def check_async_error(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...

class _Arena:
    def __init__(self, *, bytes: int, device: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def to_dlpack(self) -> object: ...

class _AdamW:
    def __init__(
        self,
        *,
        decay: float,
        beta2: float,
        weight1: float,
        weight2: float,
        step_size: float,
        correction2_sqrt: float,
        eps: float,
    ) -> None: ...

class _CrossEntropy:
    def __init__(
        self, *, classes: int, ignore_index: int, smoothing: float, weight: int, weight_total: int
    ) -> None: ...

class _Nccl(ModuleType):
    Communicator: type[_Communicator]
    Arena: type[_Arena]
    @staticmethod
    def load(candidates: list[str]) -> int: ...
    @staticmethod
    def path() -> str: ...
    @staticmethod
    def has_arenas() -> bool: ...
    @staticmethod
    def has_windows() -> bool: ...
    @staticmethod
    def has_policies() -> bool: ...
    @staticmethod
    def has_float8() -> bool: ...
    @staticmethod
    def arena_bytes() -> int: ...
    @staticmethod
    def unique_id() -> bytes: ...
    @staticmethod
    def group_start() -> None: ...
    @staticmethod
    def group_end() -> None: ...

class _Reference(ModuleType):
    AdamW: type[_AdamW]
    CrossEntropy: type[_CrossEntropy]
    @staticmethod
    def adamw(
        *, master: int, exp_avg: int, exp_avg_sq: int, gradient: int, count: int, adamw: _AdamW, scale: float
    ) -> None: ...
    @staticmethod
    def sum_of_squares(*, data: int, count: int) -> float: ...
    @staticmethod
    def accumulate(*, total: int, source: int, count: int, first: bool) -> None: ...
    @staticmethod
    def cross_entropy_forward(
        *, logits: int, stride: int, targets: int, rows: int, entropy: _CrossEntropy, losses: int, statistics: int
    ) -> None: ...
    @staticmethod
    def cross_entropy_backward(
        *,
        logits: int,
        stride: int,
        targets: int,
        rows: int,
        entropy: _CrossEntropy,
        statistics: int,
        row_gradients: int,
    ) -> None: ...

class _Cpu(ModuleType):
    @staticmethod
    def adamw(
        *,
        runs: Sequence[tuple[int, ...]],
        gradient_type: int,
        out_type: int,
        adamw: _AdamW,
        factor: float,
        threads: int,
    ) -> None: ...

class _Kernels(ModuleType):
    @staticmethod
    def adamw(
        *,
        device: int,
        stream: int,
        runs: Sequence[tuple[int, ...]],
        gradient_type: int,
        out_type: int,
        is_split: bool,
        adamw: _AdamW,
        scale: float,
        clip: int,
        skip: int,
    ) -> None: ...
    @staticmethod
    def sum_of_squares_partials(count: int) -> int: ...
    @staticmethod
    def sum_of_squares(*, device: int, stream: int, data: int, type: int, count: int, partials: int) -> None: ...
    @staticmethod
    def sum_partials(*, device: int, stream: int, partials: int, count: int, total: int) -> None: ...
    @staticmethod
    def accumulate(
        *, device: int, stream: int, total: int, source: int, type: int, count: int, first: bool
    ) -> None: ...
    @staticmethod
    def cross_entropy_forward(
        *,
        device: int,
        stream: int,
        logits: int,
        type: int,
        stride: int,
        targets: int,
        rows: int,
        entropy: _CrossEntropy,
        losses: int,
        statistics: int,
    ) -> None: ...
    @staticmethod
    def cross_entropy_backward(
        *,
        device: int,
        stream: int,
        logits: int,
        type: int,
        stride: int,
        targets: int,
        rows: int,
        entropy: _CrossEntropy,
        statistics: int,
        row_gradients: int,
    ) -> None: ...

nccl: _Nccl
reference: _Reference
cpu: _Cpu
kernels: _Kernels
