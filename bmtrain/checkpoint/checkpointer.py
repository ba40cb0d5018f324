"""Checkpoints of a whole job, of which every rank writes and reads its own part."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..alike import differing
from ..comm import Communicator
from ..context import context
from ..device import Event, processors
from ..errors import BMTrainError, CheckpointError, ConfigurationError
from ..log import warn
from ..objects import allgather_objects
from ..rng import capture, restore
from ..shard.engine import engine
from ..shard.flat import flat_of
from ..shard.in_parts import Owned, part_at
from ..shard.place import Place
from ..shard.sharded_tensor import ShardedTensor
from ..topology import share
from ..wire import from_bytes, to_bytes
from . import folder as folders
from . import storage
from .boxes import Region
from .data import ResumableLoader
from .holders import Holder, holders
from .preemption import Preemption
from .storage import RANK, STATE, Piece, Record, Stored
from .tree import ABSENT, decode, encode

T = TypeVar("T")

_SMALL = 1 << 20
"""Bytes of a whole tensor up to which rank 0 writes it."""
_LARGE = 256 << 20
"""Bytes of a rank's part from which on it is written to several files at a time."""
_MOST_FILES = 4


@dataclass
class _Staged:
    """What this rank writes, and what is known of all."""

    step: int
    pieces: list[Piece]
    tensors: dict[str, tuple[list[int], str]]
    paths: dict[str, Any]
    there: Event  # when what is to be written is there, for whatever stream reads it
    size: int  # in bytes
    beside: bool  # written while training goes on: by one thread, as they take turns with it for the interpreter


@dataclass
class _Tree:
    """What there is to save, as ``tree`` has it: text, and tensors by name."""

    state: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    own: bytes = b""
    tensors: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Any] = field(default_factory=dict)
    of_rank_0: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves all that training needs to go on, each rank its own part, and goes on from it with any number of ranks.

        ckpt = bmt.checkpoint.Checkpointer("checkpoints", model=model, optimizer=optim_manager, every=500)
        for step in range(ckpt.resume() + 1, steps + 1):
            ...
            ckpt.step(step)
        ckpt.close()

    A checkpoint holds the parts of parameters, masters and optimizer states, schedules, loss scale, the random number
    generators of every rank, and what else is given.  It is a folder ``step-0000000500`` in the format of
    ``torch.distributed.checkpoint``, with a checksum of every chunk.  It has this name only when it is whole.

    Every method but ``make_room`` is collective, as is the constructor.

    Args:
        folder: on a file system that all ranks share.
        model, optimizer, lr_scheduler: one, or a list or dict of them; an OptimManager counts as an optimizer and has
            its schedules with it.
        data: what knows the position in the data: a ``bmt.checkpoint.ResumableLoader``, or anything with state_dict and
            load_state_dict (torchdata's StatefulDataLoader), of which each rank has its own.
        keep: how many whole checkpoints stay; older ones go when a new one is complete.
        every: ``step`` saves, in the background, at multiples of this.
        exit_after: a timedelta or "3h50m"; counted from here.  ``step`` then saves and exits as on SIGTERM.
        timeout: how long ranks wait for each other while they save.
        user_state: dicts, lists, tensors, modules, optimizers, or objects with state_dict and load_state_dict, the same
            on all ranks (ShardedTensors in parts).  They are changed in place by a resume.

    Raises ConfigurationError, and from its methods CheckpointError, always on every rank.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        data: Any = None,
        keep: int = 3,
        every: int | None = None,
        exit_after: timedelta | str | None = None,
        timeout: timedelta = timedelta(hours=2),
        **user_state: Any,
    ) -> None:
        if keep < 1 or (every is not None and every < 1):
            raise ConfigurationError(f"Checkpointer needs keep and every of at least 1, not {keep} and {every}.")
        self.folder = Path(folder)
        self._keep, self._every = keep, every
        self._own = holders("data", data)
        self._data_is_shared = isinstance(data, ResumableLoader)
        given = {"model": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler, **user_state}
        self._holders: dict[str, Holder] = {}
        for name, one in given.items():
            self._holders.update(holders(name, one))
        ctx = context()
        self._rank, self._world_size, self._device = ctx.rank, ctx.world_size, ctx.device
        self._threads = min(_MOST_FILES, max(1, processors() // ctx.topology.local_size))
        self._comm = self._group(timeout)
        self._writer = ThreadPoolExecutor(1, "checkpoint writer")
        self._pending: Future[None] | None = None
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._lock: int | None = None
        self._saved: int | None = None
        self._preemption = Preemption(exit_after, lambda: ctx.host_group("preemption", timeout))

    def _group(self, timeout: timedelta) -> Communicator:
        """All ranks, for a thread beside training."""
        return context().host_group("checkpoint", timeout)

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self, step: int, wait: bool = True) -> None:
        """Save what there is now as the state after ``step``.

        Args:
            wait: False returns when this rank's part is copied, and writes it while training goes on.  The copy is on
                the device where a step of twice the size would leave as much free, unless memory is "lean"; else in
                host memory.  The next ``save``, ``resume`` or ``close`` waits for it; these or ``step`` raise its
                error.

        Raises CheckpointError on every rank, and the checkpoints that were whole stay, when some rank cannot write.
        """
        self._finish()
        what = f"The checkpoint of step {step} was not written"
        tree = self._agreed(lambda: self._tree(step), what)
        self._compare(step, tree, what)
        staged = self._agreed(lambda: self._stage(step, tree, wait), what)
        if wait:
            self._write(staged)
        else:
            self._pending = self._writer.submit(self._write, staged)
        self._saved = step

    def close(self) -> None:
        """Wait for what is being written; raises its error."""
        try:
            self._finish()
        finally:
            self._writer.shutdown()
            self._preemption.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def make_room(self) -> None:
        """Save and exit at the next step, as on SIGTERM; any rank and any thread may call this, such as one that asks a
        cloud whether the machine will be taken away.
        """
        self._preemption.ask()

    def step(self, step: int) -> None:
        """Say that ``step`` is done: saves when it is due, and ends the job when it has to make room.

        After SIGTERM or SIGUSR1 on any rank, or when ``exit_after`` has passed on any, all ranks save at the same step,
        the next one or the one after it, and exit with code ``bmt.checkpoint.PREEMPTED`` (75).  What the ranks say of
        it is exchanged while the step after runs, so nobody waits.
        """
        failed = self._pending is not None and self._pending.done() and self._pending.exception() is not None
        stop, raises = self._preemption.agreed(failed)
        if raises:
            self._finish()
        due = self._every is not None and step % self._every == 0
        if stop:
            if self._saved != step:
                self.save(step)
            self.close()
            self._preemption.leave(self._rank, step)
        elif due:
            self.save(step, wait=False)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _agreed(self, make: Callable[[], T], what: str) -> T:
        """``make()``.  Raises CheckpointError on every rank if it raises on some.  Collective."""
        made, problem = None, None
        try:
            made = make()
        except Exception as error:  # whatever it is, the others wait for the verdict
            problem = _told(error)
        every = allgather_objects(problem, self._comm)
        found = [f"rank {rank}: {theirs}" for rank, theirs in enumerate(every) if theirs is not None]
        if found:
            raise CheckpointError(f"{what}: {every[0] if len(set(every)) == 1 else '; '.join(found[:4])}")
        return made  # type: ignore[return-value]

    def _from_rank_0(self, make: Callable[[], T], what: str) -> T:
        """Rank 0's ``make()``, on every rank; its error, too.  Collective."""
        made = self._agreed(lambda: make() if self._rank == 0 else None, what)
        return allgather_objects(made, self._comm)[0]  # type: ignore[return-value]

    def _on_rank_0(self, data: bytes) -> list[bytes]:
        """Every rank's ``data`` on rank 0, nothing elsewhere.  Collective."""
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sizes = torch.empty(self._world_size, dtype=torch.int64, device="cpu")
        self._comm.all_gather(torch.tensor([len(data)], device="cpu"), sizes)
        if self._rank:
            self._comm.send(own, 0)
            return []
        found = [own, *(torch.empty(int(size), dtype=torch.uint8, device="cpu") for size in sizes[1:])]
        for rank in range(1, self._world_size):
            self._comm.recv(found[rank], rank)
        return [bytes(one.numpy()) for one in found]

    def _tree(self, step: int) -> _Tree:
        """What there is to save."""
        if type(step) is not int or step < 0:
            raise CheckpointError(f"the step must be an integer of at least 0, not {step!r}")
        tree = _Tree()
        with torch.no_grad():
            tree.state = {name: one.parts() for name, one in self._holders.items()}
            own = {name: one.parts() for name, one in self._own.items()}
        tree.text = encode(tree.state, tree.tensors, tree.paths, _is_owned)
        generators = {"host": capture(), "device": self._device.rng_state()[1]}
        tree.own = to_bytes({"generators": generators, "data": own})
        for name, value in tree.tensors.items():
            if flat_of(value) is not None:
                raise CheckpointError(f"{name} is a sharded parameter; give its module, or a copy of its .data")
            if not isinstance(value, (ShardedTensor, Owned)) and (value.layout != torch.strided or value.is_meta):
                raise CheckpointError(f"{name} is {'on the meta device' if value.is_meta else value.layout}")
        return tree

    def _compare(self, step: int, tree: _Tree, what: str) -> None:
        """Raises CheckpointError on every rank if ranks save different things.  Collective.

        Of tensors that differ, rank 0's are saved.
        """
        digests = {k: zlib.crc32(encode(v, {}, {}, _is_owned).encode()) for k, v in tree.state.items()}
        every = allgather_objects((step, digests), self._comm)
        if any(theirs[0] != every[0][0] for theirs in every):
            raise CheckpointError(f"{what}: the ranks save different steps: {[theirs[0] for theirs in every]}")
        names = [name for name in every[0][1] if any(theirs[1].get(name) != every[0][1][name] for theirs in every)]
        if names or any(theirs[1].keys() != every[0][1].keys() for theirs in every):
            raise CheckpointError(
                f"{what}: {', '.join(names) or 'what was given'} differs between ranks, and a file would keep one "
                "rank's. Make it the same, or give what is each rank's own as data=..."
            )
        plain = {n: v for n, v in tree.tensors.items() if not isinstance(v, (ShardedTensor, Owned))}
        try:
            tree.of_rank_0 = differing(context(), "The checkpoint", plain)
        except ConfigurationError as error:
            raise CheckpointError(f"{what}: {error}") from None
        if tree.of_rank_0 and self._rank == 0:
            warn(
                f"{', '.join(tree.of_rank_0[:5])}{' ...' if len(tree.of_rank_0) > 5 else ''} differ between ranks; "
                "rank 0's are saved.",
                stacklevel=3,
            )

    def _stage(self, step: int, tree: _Tree, wait: bool) -> _Staged:
        """What this rank is to write; a copy, unless it is written at once."""
        tensors, paths = dict(tree.tensors), dict(tree.paths)
        pieces = [piece for name, value in tensors.items() for piece in self._piece(name, value, tree.of_rank_0)]
        documents = {f"{RANK}{self._rank}": tree.own} | ({STATE: tree.text.encode()} if self._rank == 0 else {})
        for name, content in documents.items():
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            tensors[name], paths[name] = data, (name,)
            pieces += self._piece(name, Owned(self._rank, tuple(data.shape), data.dtype, data), [])
        size = sum(piece.numel * piece.dtype.itemsize for piece in pieces)
        if not wait:
            has_room = engine().has_room(size)
            pieces = [self._copied(piece, has_room) for piece in pieces]
        known = {n: (list(_region_of(v).whole), str(v.dtype).removeprefix("torch.")) for n, v in tensors.items()}
        return _Staged(step, pieces, known, paths, self._device.event_after(None), size, not wait)

    def _piece(self, name: str, value: Any, of_rank_0: list[str]) -> list[Piece]:
        """What this rank writes of one tensor, if anything."""
        region, start = _region_of(value), 0
        numel = prod(region.shape)
        if isinstance(value, ShardedTensor):
            place, part = value.part.place, value.part
            kept = place.kept
            # Ranks that keep the same part share the work.
            own = share(kept.stop - kept.start, len(place.copies), place.copies.index(self._rank))
            start, numel, read = kept.start + own.start, len(own), lambda: part.read()[own.start : own.stop]
        elif isinstance(value, Owned):
            numel, read = numel if value.owner == self._rank else 0, partial(_flat, value.values)  # type: ignore[arg-type]
        else:
            large = numel * value.element_size() > _SMALL and name not in of_rank_0
            writer = zlib.crc32(name.encode()) % self._world_size if large else 0
            numel, read = numel if writer == self._rank else 0, partial(_flat, value.detach())
        return [Piece(name, region, value.dtype, start, numel, read)] if numel else []

    def _copied(self, piece: Piece, has_room: bool) -> Piece:
        """The same from memory that training does not change: where it is, if that ``has_room``, or the host's."""
        values, key = piece.read(), (piece.name, piece.start)
        if has_room:
            with contextlib.suppress(torch.OutOfMemoryError):  # what is free may be in pieces
                copy = values.clone()
                return replace(piece, read=lambda: copy)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = self._device.host_buffer(values)
            if buffer.is_pinned():  # others are made as fast, and training may have them meanwhile
                self._buffers[key] = buffer
        kept = buffer
        kept.copy_(values, non_blocking=True)
        return replace(piece, read=lambda: kept)

    def _write(self, staged: _Staged) -> None:
        """Write and commit.  Collective, over this object's own group: it may run beside training."""
        what = f"The checkpoint of step {staged.step} was not written"
        written = folders.writing_path(self.folder, staged.step, self._from_rank_0(lambda: self._begin(staged), what))
        try:
            records = self._agreed(lambda: self._write_own(written, staged), what)
            every = self._on_rank_0(json.dumps(records).encode())
            self._from_rank_0(lambda: self._complete(staged, written, every), what)
        except BaseException:
            if self._rank == 0:
                shutil.rmtree(written, ignore_errors=True)
            raise

    def _write_own(self, written: Path, staged: _Staged) -> list[Record]:
        if not written.is_dir():
            raise CheckpointError(
                f"{written}, which rank 0 has made, is not there. The folder must be on a file system that all ranks "
                "share"
            )
        staged.there.synchronize()
        pieces = (staged.pieces.pop(0) for _ in range(len(staged.pieces)))
        files = 1 if staged.beside else min(self._threads, 1 + staged.size // _LARGE)
        return storage.write_pieces(written, self._rank, pieces, files, self._device.reading)

    def _begin(self, staged: _Staged) -> str:
        """Make the folder to write in; returns the word in its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = _locked(self.folder)
            folders.sweep(self.folder)
        word = uuid.uuid4().hex[:12]
        folders.writing_path(self.folder, staged.step, word).mkdir()
        return word

    def _complete(self, staged: _Staged, written: Path, every: list[bytes]) -> None:
        records = [Record(*record) for theirs in every for record in json.loads(theirs)]
        tensors = {r.name: (r.shape, r.dtype) for r in records if r.name.startswith(RANK)} | staged.tensors
        paths = {name: (name,) for name in tensors} | staged.paths
        facts = {
            "step": staged.step, "world_size": self._world_size,
            "versions": {"bmtrain": _version(), "torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip
        storage.finish(written, tensors, records, paths, facts)
        folders.commit(written, folders.path_of(self.folder, staged.step))
        try:
            folders.prune(self.folder, staged.step, self._keep)
        except OSError as error:  # the new one is whole, and there is only more than was asked for
            warn(f"An older checkpoint in {self.folder} could not be removed: {error}", stacklevel=2)

    # -- loading --------------------------------------------------------------------------------------------------

    def latest(self) -> int | None:
        """The newest step of which there is a whole checkpoint, as rank 0 sees it."""
        found = self._steps()
        return found[0] if found else None

    def _steps(self) -> list[int]:
        self._finish()
        return self._from_rank_0(lambda: folders.steps(self.folder), f"{self.folder} cannot be read")

    def resume(self, step: int | None = None, *, fall_back: bool = False) -> int:
        """Go on from the newest whole checkpoint; returns its step, or 0 if there is none, when nothing changes.

        Args:
            step: go on from this one.
            fall_back: where one is damaged, take the next older one, with a warning.

        Raises CheckpointError on every rank, with nothing loaded, when a file is damaged (which is named), or when what
        it holds does not fit.
        """
        found = self._steps()
        if step is not None:
            if step not in found:
                raise CheckpointError(f"{self.folder} has no whole checkpoint of step {step}, only of {found}.")
            newer, found = [n for n in found if n > step], [n for n in found if n <= step]
            if newer and self._rank == 0:
                warn(
                    f"Going on from step {step}, while {self.folder} has newer checkpoints, of steps {newer}, which "
                    "the next resume() would take. Remove them if they are not wanted.",
                    stacklevel=2,
                )
        for number, older in zip(found, [*found[1:], None], strict=False):
            try:
                self._load(number)
                return number
            except CheckpointError as error:
                if older is None or not fall_back:
                    hint = "" if older is None else f" The next older one is whole: resume(step={older})."
                    raise CheckpointError(f"{error}{hint}") from error
                if self._rank == 0:
                    warn(f"{error} Going on from step {older} instead.", stacklevel=2)
        return 0

    def _load(self, step: int, generators: bool = True) -> None:
        path = folders.path_of(self.folder, step)
        state, own = self._agreed(lambda: self._read(Stored(path)), f"{path} was not loaded")
        for name, one in self._holders.items():
            self._agreed(partial(one.check_parts, state[name]), f"{path} was not loaded: {name}")
        for name, one in self._holders.items():
            one.load_parts(state[name])
        for name, one in self._own.items():
            one.load_parts(own["data"][name])
        if generators and own["generators"] is not None:  # a plain file that was converted has none
            self._set_generators(**own["generators"])
        self._saved = step

    def _set_generators(self, host: Any, device: Any) -> None:
        restore(host)
        if device is not None:
            present = self._device.rng_state()
            self._device.set_rng_state((present[0], device, present[2], present[3]))

    def _read(self, stored: Stored) -> tuple[dict[str, Any], dict[str, Any]]:
        """The shared state, in which tensors are this rank's part, and what is this rank's own."""
        stored.check_sizes()
        targets: list[tuple[str, Region, int, torch.Tensor]] = []
        made: dict[tuple[str, int], Any] = {}

        def target(path: tuple[Any, ...], name: str) -> Any:
            one = self._holders.get(path[0])
            known = stored.tensors[name]
            wanted = False if one is None else one.part_at(path[1:], tuple(known.size))
            if wanted is False:
                return ABSENT
            key = (name, id(wanted))
            if key not in made:
                kept = wanted.kept if isinstance(wanted, Place) else slice(0, known.size.numel())
                region = _region_at(wanted) if isinstance(wanted, Place) else Region.of(known.size)
                out = torch.empty(kept.stop - kept.start, dtype=known.properties.dtype, device="cpu")
                targets.append((name, region, kept.start, out))
                made[key] = part_at(wanted, out) if isinstance(wanted, Place) else out.view(known.size)
            return made[key]

        state = decode(_document(stored, STATE).decode(), target)
        before = stored.facts["world_size"]
        own = from_bytes(_document(stored, f"{RANK}{self._rank if self._rank < before else 0}"))
        missing = [name for name in self._holders if name not in state]
        missing += [name for name in self._own if name not in own["data"]]
        if missing:
            raise CheckpointError(
                f"it holds nothing for {', '.join(missing)}, only {', '.join([*state, *own['data']])}"
            )
        if self._own and before != self._world_size and not self._data_is_shared:
            raise CheckpointError(
                f"{', '.join(self._own)} was saved by {before} ranks, each its own, and cannot be given to "
                f"{self._world_size}. Use data=bmt.checkpoint.ResumableLoader(loader), which any number of ranks shares"
            )
        stored.read(targets)
        return state, own


def _region_at(place: Place) -> Region:
    if place.runs is None:
        return Region.of(place.shape)
    return Region(place.shape, place.whole_shape, *place.runs)


def _region_of(value: Any) -> Region:
    """What this rank and those that have its slices hold of a tensor."""
    if not isinstance(value, ShardedTensor) or value.part.place.split is None:
        return Region.of(value.shape)
    place = value.part.place
    if value.shape != place.shape:
        raise CheckpointError(
            f"a view of {place.name} has another shape; give the tensor-parallel parameter's own shape, "
            f"{tuple(place.shape)}"
        )
    return _region_at(place)


def _is_owned(value: Any) -> bool:
    return isinstance(value, Owned)


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1)


def _document(stored: Stored, name: str) -> bytes:
    if name not in stored.tensors:
        raise CheckpointError(f"{stored.folder} was not written by bmt.checkpoint.Checkpointer: it has no {name}")
    return stored.whole(name).numpy().tobytes()


def _version() -> str:
    try:
        return importlib.metadata.version("bmtrain")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, BMTrainError) else f"{type(error).__name__}: {error}"


def _locked(folder: Path) -> int | None:
    """A handle that keeps other jobs from writing into ``folder``; None where the file system has no locks.

    It goes with the process, however that ends.
    """
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(handle)
        raise CheckpointError(
            f"another job that still runs writes its checkpoints into {folder}. Give each job a folder of its own, or "
            "end that one"
        ) from None
    except OSError:
        os.close(handle)
        return None
    return handle
