"""Small helpers that training scripts use: printing on one rank, memory, averages."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TextIO, TypeVar, cast

import torch

from .context import context, is_initialized
from .context import rank as this_rank
from .errors import ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")
_LINE_WIDTH = 60
_FOLDERS = ("log_dir", "logdir")
"""What writers of logs call the folder that they are given."""


def round_up(x: int, d: int) -> int:
    """The smallest multiple of ``d`` that is not less than ``x``."""
    return -(-x // d) * d


def print_rank(
    *args: object,
    rank: int = 0,
    sep: str | None = None,
    end: str | None = None,
    file: TextIO | None = None,
    flush: bool = False,
) -> None:
    """``print`` on one rank only."""
    if this_rank() == rank:
        print(*args, sep=sep, end=end, file=file, flush=flush)


def on_rank_0(make: Callable[P, T]) -> Callable[P, T]:
    """``make`` on rank 0; on the other ranks a function that gives an object which stands in and does nothing.

        writer = bmt.on_rank_0(SummaryWriter)("runs/now")

    For what exists once: writers of logs, trackers, dashboards.  Calls of the stand-in's methods do nothing, as do
    ``with`` and ``x[key] = value``.  What they give, and its attributes, are known on rank 0 only: a use of such a
    value raises ConfigurationError.  ``bmt.store.broadcast_object(run.id)`` gives it to all.  The folder of logs that a
    writer is given (``writer.log_dir``, ``writer.get_logdir()``) is known to all.

    No rank waits.  Before ``init_distributed`` a rank is what the launcher calls it (``RANK``).
    """

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        if this_rank() == 0:
            return make(*args, **kwargs)
        folder = next((kwargs[name] for name in _FOLDERS if name in kwargs), args[0] if args else None)
        known = folder if isinstance(folder, str | os.PathLike) else None
        return cast(T, _OnRank0(getattr(make, "__name__", "value"), known))

    return made


class _OnRank0:
    """What stands on other ranks for an object of rank 0's."""

    def __init__(self, name: str, folder: str | os.PathLike[str] | None = None) -> None:
        self._known_as = name
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._folder is not None:
            if name in _FOLDERS:
                return self._folder
            if name == "get_logdir":
                return lambda: os.fspath(self._folder)
            if name == "file_writer":
                return _OnRank0(f"{self._known_as}.{name}", self._folder)
        return _ValueOnRank0(f"{self._known_as}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> _ValueOnRank0:
        return _ValueOnRank0(f"{self._known_as}()")

    def __getitem__(self, key: Any) -> _ValueOnRank0:
        return _ValueOnRank0(f"{self._known_as}[...]")

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __enter__(self) -> _OnRank0:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _ValueOnRank0(_OnRank0):
    """What stands for what such an object's attributes and calls give."""

    def _unknown(self, *args: object) -> NoReturn:
        raise ConfigurationError(
            f"{self._known_as} is known on rank 0 only. Call bmt.store.broadcast_object(...) with it on every rank for "
            "a value that all ranks use."
        )

    __bool__ = __str__ = __format__ = __fspath__ = __int__ = __float__ = __index__ = __len__ = __iter__ = _unknown
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __contains__ = _unknown
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __mod__ = _unknown


def print_block(title: str, content: str | None = None, file: TextIO | None = None) -> None:
    """Print ``title`` in a line of equal signs, and ``content`` below it.  ``file`` is standard output by default."""
    print(f" {title} ".center(_LINE_WIDTH, "="), file=file or sys.stdout)
    if content is not None:
        print(content, file=file or sys.stdout)


def print_dict(title: str, content: Mapping[str, object], file: TextIO | None = None) -> None:
    """Print a dict as a block with one key a line; long values go on below their beginning."""
    indent = round_up(max((len(key) for key in content), default=0) + 3, 4)
    room = max(_LINE_WIDTH - indent, 1)
    lines = []
    for key, value in content.items():
        text = str(value) or " "
        rows = [text[start : start + room] for start in range(0, len(text), room)]
        lines.append(f"{key} :".ljust(indent) + rows[0])
        lines += [" " * indent + row for row in rows[1:]]
    print_block(title, "\n".join(lines) + "\n", file)


def see_memory(message: str, detail: bool = False) -> None:
    """Print on rank 0 how much memory the GPU's allocator holds, now and at most since the last call, in GB (2**30
    bytes).

    ``detail`` prints the allocator's whole summary instead.  Without GPU it prints the process's largest memory so far.
    """
    device = context().device.torch_device if is_initialized() and context().device.is_cuda else None
    if device is None:
        print_rank(f"{message}\nlargest resident memory so far: {_largest_resident():.2f} GB")
        return
    if detail:
        print_rank(message, torch.cuda.memory_summary(device), sep="\n")
    else:
        now, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        print_rank(f"{message}\nallocated now: {now / 2**30:.2f} GB\nallocated at most: {most / 2**30:.2f} GB")
    torch.cuda.reset_peak_memory_stats(device)


def check_torch_version(version: str) -> int:
    """Positive if the installed torch is newer than ``version`` ("2.9.1"), negative if older, else 0.

    The number is the difference in the first part that differs.
    """
    installed = [int(part) for part in torch.__version__.split("+")[0].split(".") if part.isdigit()]
    for have, want in zip(installed, map(int, version.split(".")), strict=False):
        if have != want:
            return have - want
    return 0


def tp_split_tensor(tensor: torch.Tensor, split_dim: int) -> torch.Tensor:
    """This tensor-parallel rank's part of ``tensor`` along ``split_dim``, as a new contiguous tensor."""
    topology = context().topology
    part = tensor.chunk(topology.tp_size, dim=split_dim)[topology.tp_rank]
    return part.clone(memory_format=torch.contiguous_format)


def load_nccl_pypi() -> None:
    """Load the NCCL library that pip installs with torch, if it is there, for libraries that look for it by name."""
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return
    for folder in package.submodule_search_locations or () if package else ():
        for library in sorted(Path(folder, "lib").glob("libnccl.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class AverageRecorder:
    """A running mean that forgets: each value counts ``alpha`` times as much as the next one.

    Corrected for its start, so that after one value it is that value.
    """

    def __init__(self, alpha: float = 0.9, start_value: float = 0) -> None:
        self.alpha = alpha
        self._value = start_value
        self._steps = 0

    def record(self, v: float) -> None:
        """Take ``v`` into the mean."""
        self._value = self._value * self.alpha + v * (1 - self.alpha)
        self._steps += 1

    @property
    def value(self) -> float:
        """The mean so far; the start value before the first record."""
        return self._value / (1 - self.alpha**self._steps) if self._steps else self._value


def _largest_resident() -> float:
    try:
        import resource
    except ImportError:  # not a Unix
        return float("nan")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**30 if sys.platform == "darwin" else 2**20)
