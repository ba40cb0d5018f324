"""The NCCL library of this process: loading it, and its codes for types and operations."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..errors import CommunicationError

try:
    from .. import _C
except ImportError:  # built without a compiler, or not built
    built = False
else:
    built = True

BYTE = 1
_TYPES = {
    torch.int8: 0, torch.uint8: BYTE, torch.bool: BYTE, torch.int32: 2, torch.uint32: 3, torch.int64: 4,
    torch.uint64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
_FLOAT8 = {torch.float8_e4m3fn: 10, torch.float8_e5m2: 11}
_OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}
_BOOL_OPS = {"sum": "max", "prod": "min", "max": "max", "min": "min"}  # or, and; on bytes of 0 and 1


def available() -> bool:
    """Whether NcclCommunicator can be used: a GPU, bmtrain's compiled extension and NCCL are there."""
    if not (built and torch.cuda.is_available()):
        return False
    try:
        version()
    except CommunicationError:
        return False
    return True


def version() -> int:
    """NCCL's version as one number, 22809 for 2.28.9.  Raises CommunicationError when there is no NCCL."""
    if not built:
        raise CommunicationError(
            "NCCL needs bmtrain's compiled extension, which this installation lacks. "
            "With a C++ compiler at hand, install bmtrain again: BMTRAIN_EXTENSION=1 pip install --force-reinstall "
            "--no-deps . (python -m bmtrain doctor says more)."
        )
    return _C.nccl.load(_candidates())


def arena_bytes() -> int:
    """GPU memory in buffers from ``NcclCommunicator.alloc``, of all devices; torch's memory statistics leave it out."""
    return _C.nccl.arena_bytes() if built else 0


def type_code(dtype: torch.dtype) -> int | None:
    """NCCL's number for ``dtype``; None if this NCCL does not know the type."""
    if dtype in _FLOAT8:
        return _FLOAT8[dtype] if built and _C.nccl.has_float8() else None
    return _TYPES.get(dtype)


def op_code(op: str, dtype: torch.dtype) -> int | None:
    """NCCL's number for reducing ``dtype`` by ``op``; None if there is no such operation."""
    name = _BOOL_OPS.get(op) if dtype == torch.bool else op
    return None if name is None else _OPS.get(name)


def _candidates() -> list[str]:
    """Where to look for NCCL when torch has not loaded it: the system, then the package that torch depends on."""
    names = ["libnccl.so.2"]
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        package = None
    folders = package.submodule_search_locations if package is not None else None
    return names + [str(Path(folder) / "lib" / "libnccl.so.2") for folder in folders or ()]
