"""A script's own checkpoints, a dictionary in a file, of which every rank writes and reads its own part.

``bmt-convert --unsafe`` writes these calls in place of ``torch.save`` and ``torch.load``; whoever writes a script anew
takes a ``Checkpointer``, whose files these are.
"""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..block.in_turn import comes_in_turn, named_state
from ..comm import Communicator
from ..context import Context, context, is_initialized
from ..errors import CheckpointError
from ..log import say, warn
from ..objects import allgather_objects, broadcast_object
from ..shard.in_parts import InParts, Owned, in_parts
from ..shard.place import Place
from . import folder as folders
from .checkpointer import Checkpointer
from .files import save_checkpoint
from .holders import holders
from .storage import METADATA, STATE, Stored
from .tree import decode

VALUES = "_values"
"""Of a checkpoint, the name of what ``torch.save`` makes of its other entries."""
_NEWEST = "newest checkpoint"


class Sharded:
    """An entry of ``save_sharded``'s dictionary of which each rank writes its own part: a model, or an optimizer."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __reduce__(self) -> str:
        raise CheckpointError("a Sharded is an entry of save_sharded's dictionary itself, not of something in it")


def save_sharded(obj: dict[str, Any], f: str | os.PathLike[str]) -> None:
    """As ``torch.save(obj, f)``, of whose ``Sharded`` entries each rank writes its own part.  Collective.

        bmt.checkpoint.save_sharded({"model": bmt.checkpoint.Sharded(model), "step": step}, "run/last.pt")

    ``f`` becomes a folder, of which ``load_sharded`` reads the newest whole checkpoint, and in which the last one is
    kept until the next is whole.  A file that has the name is renamed to ``last.pt.plain``.  The other entries are rank
    0's, pickled as ``torch.save`` does.  Without a Sharded entry this is ``bmt.save_checkpoint``.

    Raises CheckpointError on every rank, and what was whole stays, when some rank cannot write.
    """
    marked = {name: one.of for name, one in obj.items() if isinstance(one, Sharded)} if type(obj) is dict else {}
    if not marked:
        save_checkpoint(obj, f)
        return
    path = Path(f)
    trains = any(not isinstance(one, nn.Module) for one in marked.values())
    whole = {k: one.state_dict() for k, one in marked.items() if not _gives_parts(one)}
    marked = {k: one for k, one in marked.items() if k not in whole}
    others = {k: None if k in marked else whole.get(k, v) for k, v in obj.items()}
    ctx = context()
    with ctx.diary.saving():
        values = _Values.of(others, path)
        problem = _make_way(path) if ctx.rank == 0 else None
        problem = broadcast_object(problem)
        if problem is not None:
            raise CheckpointError(f"Rank 0 could not write {path}: {problem}")
        checkpoints = _OfScript(
            path, {VALUES: values, **_written_once({_stored_as(k): one for k, one in marked.items()})}
        )
        try:
            checkpoints.save((checkpoints.latest() or 0) + 1)
        finally:
            checkpoints.close()
        if ctx.rank == 0 and trains:
            _take_down(path)


def _stored_as(name: Any) -> Any:
    """The name in a checkpoint of a dictionary's entry, which is never VALUES."""
    return f"{name}'" if isinstance(name, str) and name.startswith(VALUES) else name


def _gives_parts(of: Any) -> bool:
    """Whether its state is in parts; else it is an ordinary value, as what a model's own hooks put into its state."""
    return comes_in_turn(of) if isinstance(of, nn.Module) else in_parts(of) is not None


def load_sharded(f: Any, map_location: Any = None, **options: Any) -> Any:
    """As ``torch.load(f, ...)``, also of what ``save_sharded`` has written: the dictionary.

    What was Sharded is a mapping that reads from the files what it is asked for.  Give it to
    ``bmt.checkpoint.load_state_dict``, and each rank reads its own part.
    """
    if not isinstance(f, (str, os.PathLike)) or not os.path.isdir(f):
        return torch.load(f, map_location, **options)
    folder = Path(f)
    found = folders.steps(folder)
    if not found and not (folder / METADATA).exists():
        raise CheckpointError(f"{folder} is a folder without a whole checkpoint.")
    stored = Stored(folders.path_of(folder, found[0]) if found else folder)
    stored.check_sizes()
    tree = decode(stored.whole(STATE).numpy().tobytes().decode(), lambda path, name: _Unread(name))
    if VALUES not in tree:
        raise CheckpointError(
            f"{folder} was written by a Checkpointer without a script's dictionary: resume() of one reads it."
        )
    pickled = io.BytesIO(stored.whole(tree.pop(VALUES)["pickled"].name).numpy().tobytes())
    options = {name: value for name, value in options.items() if name != "mmap"}
    values = torch.load(pickled, map_location, **options)
    names = {k: _stored_as(k) for k in values}
    return {
        k: StoredState(stored, names[k], tree[names[k]], map_location) if names[k] in tree else v
        for k, v in values.items()
    }


def load_state_dict(of: Any, state_dict: Any, *args: Any, **options: Any) -> Any:
    """``of.load_state_dict(state_dict, ...)``; of what ``load_sharded`` gave, each rank its own part.  Collective.

    Raises CheckpointError on every rank, with nothing loaded, when a file is damaged, or what it holds does not fit.
    """
    if not isinstance(state_dict, StoredState):
        return of.load_state_dict(state_dict, *args, **options)
    if not is_initialized() or not state_dict.fits(of, options.get("strict", args[0] if args else True)):
        return of.load_state_dict(state_dict.copy(), *args, **options)
    state_dict.load_into(of)
    return _IncompatibleKeys([], []) if isinstance(of, nn.Module) else None


def newest(instead: Any = None) -> Any:
    """Where the attempt that torchrun has replaced by this one saved an optimizer last; else ``instead``.  Collective.

    It is told once, so that a process that trains a second time begins anew.
    """
    ctx = context()
    if ctx.went_on:
        return instead
    ctx.went_on = True
    found = broadcast_object(_recalled(ctx) if ctx.rank == 0 else None)
    if found is None:
        return instead
    if ctx.rank == 0:
        say(f"started again: going on from {found}")
    return found


def _recalled(ctx: Context) -> str | None:
    try:
        found = ctx.launcher.recall(_NEWEST)
    except RuntimeError as error:
        warn(f"The launcher does not say where the newest checkpoint is: {error}", stacklevel=3)
        return None
    return found if found is not None and _is_ours(found) else None


def _take_down(path: Any, moved_from: Any = None) -> None:
    """Where the newest checkpoint is, for the attempts after this one; of one that was moved, only if it is that."""
    launcher = context().launcher
    try:
        if moved_from is None or launcher.recall(_NEWEST) == str(Path(moved_from).absolute()):
            launcher.remember(_NEWEST, str(Path(path).absolute()))
    except RuntimeError as error:
        warn(f"The launcher did not take down where the checkpoint is: {error}", stacklevel=3)


def copy_sharded(src: Any, dst: Any) -> Any:
    """As ``shutil.copy``, also of what ``save_sharded`` has written; for one rank."""
    if not os.path.isdir(src) and not _is_ours(dst):
        return shutil.copy(src, dst)
    dst = _place(src, dst)
    made = _beside(dst)
    try:
        (shutil.copytree if os.path.isdir(src) else shutil.copy)(src, made)
        return rename_sharded(made, dst)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def rename_sharded(src: Any, dst: Any) -> Any:
    """As ``shutil.move``, also of what ``save_sharded`` has written; for one rank."""
    if not os.path.isdir(src) and not _is_ours(dst):
        return shutil.move(src, dst)
    dst = _place(src, dst)
    old = _beside(dst)
    if os.path.exists(dst):
        os.rename(dst, old)
    shutil.move(src, dst)
    if old.exists():
        remove_sharded(old)
    if is_initialized():
        _take_down(dst, moved_from=src)
    return dst


def _is_ours(path: Any) -> bool:
    return os.path.isdir(path) and bool(folders.steps(Path(path)))


def _place(src: Any, dst: Any) -> Any:
    """Where ``shutil`` puts what it copies and moves: into a folder, here one that is no checkpoint, under its name."""
    return os.path.join(dst, os.path.basename(src)) if os.path.isdir(dst) and not _is_ours(dst) else dst


def _beside(path: Any) -> Path:
    return Path(f"{os.fspath(path)}.{uuid.uuid4().hex[:12]}")


def remove_sharded(path: Any) -> None:
    """As ``os.remove``, also of what ``save_sharded`` has written; for one rank."""
    if not os.path.isdir(path) or os.path.islink(path):
        os.remove(path)
    elif _is_ours(path):
        shutil.rmtree(path)
    else:
        raise CheckpointError(f"{path} is a folder without a whole checkpoint; it stays.")


class StoredState(MutableMapping[Any, Any]):
    """The state dict of a Sharded entry, whole tensors, each read when it is asked for."""

    def __init__(self, stored: Stored, name: str, tree: dict[Any, Any], map_location: Any) -> None:
        self._stored, self._name = stored, name
        self._tree = {key: value for key, value in tree.items() if key != "masters"}  # not torch's
        self._device = map_location if isinstance(map_location, (str, torch.device)) else None
        self._changed = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """So that ``isinstance(state, dict)`` is what it is of torch's."""
        return OrderedDict

    def __getitem__(self, key: Any) -> Any:
        return self._read(self._tree[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._tree[key], self._changed = value, True

    def __delitem__(self, key: Any) -> None:
        del self._tree[key]
        self._changed = True

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def copy(self) -> dict[Any, Any]:
        """As of a dict: all of it."""
        return self._read(self._tree)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.copy().items())

    def _read(self, tree: Any) -> Any:
        if isinstance(tree, _Unread):
            whole = self._stored.whole(tree.name)
            return whole if self._device is None else whole.to(self._device)
        if isinstance(tree, dict):
            return {key: self._read(value) for key, value in tree.items()}
        return [self._read(value) for value in tree] if isinstance(tree, list) else tree

    def fits(self, of: Any, strict: bool) -> bool:
        """Whether ``of`` can take its part of this, or say why not; else it needs all of it."""
        if self._changed:
            return False
        return not isinstance(of, nn.Module) or (
            comes_in_turn(of) and (strict or named_state(of).keys() == self.keys())
        )

    def _is_there(self) -> bool:
        """Whether the files are still those that were opened, as a script may have renamed others to their place."""
        try:
            return Stored(self._stored.folder).facts == self._stored.facts
        except CheckpointError:
            return False

    def load_into(self, of: Any) -> None:
        """Each rank's part of it.  Collective."""
        every = allgather_objects((str(self._stored.folder), self._name, self._is_there()))
        if len({theirs[:2] for theirs in every}) > 1:
            raise CheckpointError(f"The ranks load different checkpoints, so nothing was loaded: {every}")
        if not all(theirs[2] for theirs in every):
            raise CheckpointError(
                f"{self._stored.folder} was removed or written again since load_sharded, so nothing was loaded. Load "
                f"what you need before you save there, or keep {self._name}.copy()."
            )
        checkpoints = _OfScript(self._stored.folder.parent, {self._name: of})
        try:
            checkpoints.load_step(self._stored.facts["step"])
        finally:
            checkpoints.close()


class _Unread:
    """A tensor in a tree."""

    def __init__(self, name: str) -> None:
        self.name = name


class _OfScript(Checkpointer):
    """Of one call: it waits, so that it needs no group of its own."""

    def __init__(self, folder: Path, given: dict[str, Any]) -> None:
        super().__init__(folder, keep=1)
        for name, one in given.items():  # which may be called as the parameters of a Checkpointer are
            self._holders.update(holders(name, one))

    def load_step(self, step: int) -> None:
        """What the checkpoint of ``step`` holds; the generators go on, as the script does not save them."""
        self._load(step, generators=False)

    def _group(self, timeout: timedelta) -> Communicator:
        return context().control


def _written_once(marked: dict[str, Any]) -> dict[str, Any]:
    """An OptimManager, which stands where a script had its GradScaler, shares the state of its optimizers."""
    known = {id(one): _Once(own, {}) for one in marked.values() if (own := in_parts(one)) is not None}
    for one in known.values():
        one.known = known
    return {name: known.get(id(one), one) for name, one in marked.items()}


class _Once:
    """What is saved in parts, made once."""

    def __init__(self, of: InParts, known: dict[int, _Once]) -> None:
        self._of, self.known = of, known
        self._parts: dict[str, Any] | None = None

    def parts(self) -> dict[str, Any]:
        """As ``shard.in_parts`` says."""
        if self._parts is None:
            self._parts = found = self._of.parts()
            driven = enumerate(getattr(self._of, "optimizers", ()))
            for number, one in ((n, self.known[id(o)]) for n, o in driven if id(o) in self.known):
                optimizers = found["optimizers"]
                assert isinstance(optimizers, list)
                optimizers[number] = one.parts()
        return self._parts

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        """As ``shard.in_parts`` says."""
        return self._of.part_at(path, shape)

    def check_parts(self, state: Any) -> None:
        """As ``shard.in_parts`` says."""
        self._of.check_parts(state)

    def load_parts(self, state: Any) -> None:
        """As ``shard.in_parts`` says."""
        self._of.load_parts(state)


class _Values:
    """Rank 0's values, pickled, as a Checkpointer takes them."""

    def __init__(self, size: int, pickled: torch.Tensor | None) -> None:
        self._size, self._pickled = size, pickled

    @staticmethod
    def of(values: dict[str, Any], path: Any) -> _Values:
        """Collective.  Raises CheckpointError on every rank for what rank 0 cannot pickle."""
        pickled, problem = None, None
        if context().rank == 0:
            buffer = io.BytesIO()
            try:
                torch.save(values, buffer)
                pickled = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
            except Exception as error:  # pickling may raise anything, and the others wait for the verdict
                problem = f"{type(error).__name__}: {error}"
        size, problem = broadcast_object((0 if pickled is None else pickled.numel(), problem))
        if problem is not None:
            raise CheckpointError(f"Rank 0 could not write {path}: {problem}")
        return _Values(size, pickled)

    def parts(self) -> dict[str, Any]:
        """As ``shard.in_parts`` says."""
        return {"pickled": Owned(0, (self._size,), torch.uint8, self._pickled)}

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        """As ``shard.in_parts`` says."""
        return True

    def check_parts(self, state: Any) -> None:
        """As ``shard.in_parts`` says."""

    def load_parts(self, state: Any) -> None:
        """``load_sharded`` reads them."""


def _make_way(path: Path) -> str | None:
    """Rename a file that has the name of the folder; returns why not."""
    try:
        if path.exists() and not path.is_dir():
            kept = path.with_name(path.name + ".plain")
            path.rename(kept)
            warn(f"{path} becomes a folder; the file of that name is now {kept}.", stacklevel=3)
    except OSError as error:
        return str(error)
    return None
