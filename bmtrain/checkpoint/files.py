"""Checkpoints as files: written once, by rank 0, in torch's own format and under the unconverted model's keys."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..context import Context, context
from ..errors import CheckpointError
from ..objects import allgather_objects, broadcast_object
from . import pickled


def save(model: nn.Module, file_name: str | os.PathLike[str], non_blocking: bool = False) -> None:
    """Write ``model.state_dict()`` to ``file_name``; plain ``torch.load`` reads it.  Collective.

    The file appears complete or not at all.

    Args:
        non_blocking: return before rank 0 has written the file; ``bmt.synchronize()`` does not wait for it either.

    Raises CheckpointError on every rank when rank 0 cannot write.
    """
    with context().diary.saving():
        state = pickled.with_whole_tensors(OrderedDict(model.state_dict()))
    if non_blocking:
        if context().rank == 0:
            threading.Thread(target=_write, args=(state, Path(file_name)), daemon=False).start()
        return
    save_checkpoint(state, file_name)


def save_checkpoint(obj: Any, file_name: str | os.PathLike[str], **options: Any) -> None:
    """``torch.save`` of rank 0's ``obj``; the others wait until the file is there.  Collective.

    ``options`` are those of ``torch.save``.

    ``obj`` is evaluated by every rank, so it may hold ``model.state_dict()`` and ``optimizer.state_dict()``.
    ShardedTensors in its dicts, lists and tuples are written whole, as ordinary tensors.  A model itself is gathered
    and pickled as an ordinary one; ``torch.load`` in a job of bmtrain's shards it again.  The file
    appears complete or not at all.  Raises CheckpointError on every rank when rank 0 cannot write.
    """
    problem = None
    with context().diary.saving():
        obj = pickled.with_whole_tensors(obj)
        with pickled.whole(obj) as models:
            if models:
                options.setdefault("pickle_module", pickled)
            if context().rank == 0:
                try:
                    _write(obj, Path(file_name), **options)
                except Exception as error:  # pickling may raise anything, and the others wait for the verdict
                    problem = f"{type(error).__name__}: {error}"
        problem = broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(f"Rank 0 could not write {file_name}: {problem}")


def _write(obj: Any, path: Path, **options: Any) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(obj, file, **options)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(model: nn.Module, file_name: str | os.PathLike[str], strict: bool = True) -> Any:
    """Load a state dict written by ``bmt.save`` or by ``torch.save(model.state_dict(), ...)``.  Collective.

    Ranks that see the file read it; the others (no shared file system) get it from rank 0.  Raises CheckpointError,
    on every rank, when rank 0 cannot read it or its keys or shapes do not fit; then nothing was loaded.
    """
    ctx = context()
    state, problem = _read(Path(file_name))
    problems = allgather_objects(problem)
    if problems[0] is not None:
        raise CheckpointError(f"Rank 0 could not read {file_name}: {problems[0]}")
    if any(p is not None for p in problems):
        state = _from_rank_0(ctx, state)
    return model.load_state_dict(state, strict)


def _read(path: Path) -> tuple[Any, str | None]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling may raise anything; the caller reports it
        return None, f"{type(error).__name__}: {error}"
    if not isinstance(state, dict):
        return None, f"it holds a {type(state).__name__}, not a state dict"
    return state, None


def _from_rank_0(ctx: Context, state: Any) -> dict[str, Any]:
    kinds = {k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for k, v in (state or {}).items()}
    kinds = broadcast_object(kinds)
    out: dict[str, Any] = {}
    for key, kind in kinds.items():
        if isinstance(kind, tuple) and len(kind) == 2 and isinstance(kind[1], torch.dtype):
            tensor = (
                state[key].contiguous().clone() if ctx.rank == 0 else torch.empty(kind[0], dtype=kind[1], device="cpu")
            )
            if tensor.numel():
                ctx.control.broadcast(tensor, 0)
            out[key] = tensor
        else:
            out[key] = kind
    return out
