"""Checkpoints as files: written once, by rank 0, in torch's own format and under the unconverted model's keys."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..block.in_turn import (
    comes_in_turn,
    facts_of,
    metadata_of,
    methods_of,
    named_state,
    named_tensors,
    whole_in_pieces,
)
from ..block.record import unit_of
from ..block.sharded import ShardedModule, level_statistics, own_slices, require_same, whole_state
from ..context import Context, context
from ..errors import CheckpointError, ConfigurationError
from ..objects import allgather_objects, broadcast_object
from ..shard.engine import engine
from ..written import replacing
from . import pickled, safetensors
from .torch_file import write_in_turn


def save(model: nn.Module, file_name: str | os.PathLike[str], non_blocking: bool = False) -> None:
    """Write ``model.state_dict()`` to ``file_name``; plain ``torch.load`` reads it.  Collective.

    The file appears complete or not at all.  What is whole is in the file, and not in
    memory; only where hooks of the model or ``non_blocking`` need it, rank 0 has the whole model in memory, and where a
    ``state_dict`` method of the model's own does, every rank.

    Args:
        non_blocking: return before rank 0 has written the file; ``bmt.synchronize()`` does not wait for it either.  The
            next ``bmt.save`` or ``bmt.save_checkpoint`` does, and raises its error.

    Raises CheckpointError on every rank when rank 0 cannot write.
    """
    _require_model(model, "bmt.save writes the state dict of a model", "bmt.save_checkpoint(obj, file)")
    own = any("state_dict" in methods_of(inner) for inner in model.modules())
    if not non_blocking and comes_in_turn(model):
        _save_in_turn(model, Path(file_name))
        return
    with context().diary.saving():
        state = model.state_dict() if own else whole_state(model, keep=context().rank == 0)
        state = pickled.with_whole_tensors(OrderedDict(state))
    if not non_blocking:
        save_checkpoint(state, file_name)
        return
    _finish_background()
    if context().rank == 0:
        context().writer = _Writer(state, Path(file_name))


def _require_model(given: object, what: str, instead: str) -> None:
    if not isinstance(given, nn.Module):
        raise ConfigurationError(f"{what}, and was given a {type(given).__name__}. For anything else: {instead}.")


def _save_in_turn(model: nn.Module, path: Path) -> None:
    """The same, in pieces of 16 MiB."""
    with context().diary.saving():
        _finish_background()
        if context().world_size > 1:
            engine().meet(f"the saving of {type(model).__name__}")
        level_statistics(model)
        values = named_tensors(model)
        firsts: dict[int, str] = {}
        ties = {name: firsts.setdefault(id(value), name) for name, value in values.items()}
        pieces = ((name, *piece) for name in firsts.values() for piece in whole_in_pieces(values[name]))
        problem = None
        if context().rank == 0:
            kinds = {name: facts_of(values[name]) for name in firsts.values()}
            try:
                write_in_turn(path, kinds, ties, metadata_of(model), pieces)
            except Exception as error:  # of many kinds, and the others wait for the verdict
                problem = f"{type(error).__name__}: {error}"
        for _ in pieces:  # all of them where nothing is written, what is left where it failed
            pass
        problem = broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(f"Rank 0 could not write {path}: {problem}")


_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""Names of a folder's one file, the first that is there."""


class _Writer(threading.Thread):
    """Writes a file; its error is printed, and kept for whoever comes next."""

    def __init__(self, state: Any, path: Path) -> None:
        super().__init__(name=f"writer of {path}")
        self._state, self._path = state, path
        self.problem: str | None = None
        self.start()

    def run(self) -> None:
        """In the thread."""
        try:
            write(self._state, self._path)
        except Exception as error:
            self.problem = f"{self._path}: {type(error).__name__}: {error}"
            raise
        finally:
            self._state = None


def background_writer() -> threading.Thread | None:
    """The thread of ``save(non_blocking=True)`` that is still writing; None when all is written, and beyond rank 0."""
    writer = context().writer
    return writer if isinstance(writer, threading.Thread) and writer.is_alive() else None


def _finish_background() -> None:
    """Wait for what ``save(non_blocking=True)`` still writes.  Collective.  Raises CheckpointError on every rank."""
    ctx = context()
    writer, ctx.writer = ctx.writer, None
    if writer is not None:
        writer.join()
    problem = broadcast_object(None if writer is None else writer.problem)
    if problem is not None:
        raise CheckpointError(f"Rank 0 could not write, in the background, {problem}. Nothing was written now either.")


def save_checkpoint(obj: object, f: str | os.PathLike[str], **options: Any) -> None:
    """``torch.save`` of rank 0's ``obj``; the others wait until the file is there.  Collective.

    Its parameters have the names of ``torch.save``'s, of which ``options`` are the others.

    ``obj`` is evaluated by every rank, so it may hold ``model.state_dict()`` and ``optimizer.state_dict()``.
    ShardedTensors in its dicts, lists and tuples are written whole, as ordinary tensors.  A model itself is gathered
    and pickled as an ordinary one; ``torch.load`` in a job of bmtrain's shards it again.  The file
    appears complete or not at all.  Raises CheckpointError on every rank when rank 0 cannot write.
    """
    problem = None
    _refuse_shards(obj)
    with context().diary.saving():
        _finish_background()
        obj = pickled.with_whole_tensors(obj)
        with pickled.whole(obj) as models:
            if models:
                options.setdefault("pickle_module", pickled)
            if context().rank == 0:
                try:
                    write(obj, f, **options)
                except Exception as error:  # pickling may raise anything, and the others wait for the verdict
                    problem = f"{type(error).__name__}: {error}"
        problem = broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(f"Rank 0 could not write {f}: {problem}")


def _refuse_shards(obj: object) -> None:
    """Raises CheckpointError, on every rank, if some rank's ``obj`` has an optimizer state of that rank alone."""
    found = torch.tensor([int(context().world_size > 1 and _has_shards(obj))], device="cpu")
    context().control.all_reduce(found, "max")
    if int(found):
        raise CheckpointError(
            "This holds one rank's shards of an optimizer's state, and a file would keep rank 0's alone. Write "
            "optimizer.state_dict() or optim_manager.state_dict(), without gather=False or gather_opt=False. Nothing "
            "was written."
        )


def _has_shards(obj: object) -> bool:
    if isinstance(obj, dict):
        return "shard_of" in obj or any(map(_has_shards, obj.values()))
    return isinstance(obj, (list, tuple)) and any(map(_has_shards, obj))


def write(obj: object, file_name: str | os.PathLike[str], **options: Any) -> None:
    """``torch.save`` by this process alone; the file appears complete or not at all."""
    with replacing(Path(file_name)) as temporary, open(temporary, "wb") as file:
        torch.save(obj, file, **options)


def load(model: nn.Module, file_name: str | os.PathLike[str], strict: bool = True, *, weights_only: bool = True) -> Any:
    """Load a state dict written by ``bmt.save`` or by ``torch.save(model.state_dict(), ...)``.  Collective.

    Also files of safetensors, and folders that ``save_pretrained`` has written, of one file or several with an index;
    of what the model ties, they hold one.  Files are mapped, so that no rank has more of them in memory than it copies.

    Ranks that see the file read it; the others (no shared file system) get it from rank 0.

    Args:
        weights_only: as ``torch.load``'s; False runs whatever code the file holds.

    Raises CheckpointError, on every rank, when rank 0 cannot read it, when its keys, shapes or kinds do not fit, or
    when files of this name differ between nodes; then nothing was loaded.
    """
    _require_model(
        model, "bmt.load(model, file) loads the state dict of a model", 'torch.load(file, map_location="cpu")'
    )
    ctx = context()
    state, problem = _read(model, Path(file_name), weights_only)
    problems = allgather_objects(problem)
    if problems[0] is not None:
        raise CheckpointError(f"Rank 0 could not read {file_name}: {problems[0]}")
    if any(p is not None for p in problems):
        state = _from_rank_0(ctx, state)
    if not isinstance(model, ShardedModule) or unit_of(model) is None:  # those compare by themselves
        require_same(model, state)
        state = own_slices(model, state)
    return model.load_state_dict(state, strict)


def _with_ties(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with what is left out of it as the model has it under two names."""
    values, found = named_state(model), dict(state)
    known = {id(values[name]): value for name, value in state.items() if name in values}
    found.update({n: known[id(v)] for n, v in values.items() if n not in found and id(v) in known})
    return found


def _mapped(path: Path, weights_only: bool) -> Any:
    """What a file holds, or the files of a folder."""
    if path.suffix == ".safetensors":
        return safetensors.mapped(path)
    if path.is_dir():
        whole = [path / name for name in _WHOLE if (path / name).is_file()]
        index = [path / f"{name}.index.json" for name in _WHOLE if (path / f"{name}.index.json").is_file()]
        if not whole and not index:
            raise FileNotFoundError(f"the folder has none of {', '.join(_WHOLE)}, nor an index of one")
        if whole:
            return _mapped(whole[0], weights_only)
        names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
        return {key: value for name in names for key, value in _mapped(path / Path(name).name, weights_only).items()}
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


def _read(model: nn.Module, path: Path, weights_only: bool) -> tuple[Any, str | None]:
    try:
        state = _mapped(path, weights_only)
        if path.is_dir() or path.suffix == ".safetensors":
            state = _with_ties(model, state)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error):
            return None, f"UnpicklingError: {error}"
        lines = [line.strip() for line in str(error).splitlines() if "WeightsUnpickler error" in line]
        return None, (
            f"it holds more than tensors and plain values, which reading could run as code ({' '.join(lines)}). If you "
            "trust whoever wrote it: bmt.load(model, path, weights_only=False)"
        )
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
