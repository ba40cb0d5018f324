"""One checkpoint in a folder: the files of torch.distributed.checkpoint, and a checksum of every chunk beside them.

    __0_0.distcp, __1_0.distcp ...   what each rank has written, chunk after chunk, each as torch.save writes a tensor;
                                     a large part is in several, __0_0, __0_1 ...
    manifest.json                    sizes and checksums of all chunks and of .metadata, versions, the step
    .metadata                        torch.distributed.checkpoint's own; where it is missing, the rest is incomplete

Nothing here talks to other ranks.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..errors import CheckpointError
from ..written import sync_folder
from .boxes import Region

MANIFEST, METADATA = "manifest.json", ".metadata"
FORMAT = 1
STATE, RANK = "_state", "_rank."
"""The documents of a checkpoint, beside its tensors: the tree they are part of, and what is each rank's own."""
_MOST = 16 << 20
"""Bytes of one chunk: what is copied at once, and verified at once."""

_ALL = 1 << 62
Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """What one rank writes of one tensor: the elements from ``start`` on in its flattened ``region``.

    Attributes:
        read: gives them, (n,) on any device, when they are written.
        numel: how many they are.
    """

    name: str
    region: Region
    dtype: torch.dtype
    start: int
    numel: int
    read: Callable[[], torch.Tensor]


class Record(NamedTuple):
    """A chunk that was written.  Plain values, as other ranks get it."""

    name: str
    shape: list[int]
    dtype: str
    offsets: list[int]
    sizes: list[int]
    file: str
    position: int
    length: int
    crc32: int


def open_file(path: Path, mode: str) -> IO[bytes]:
    """How every file of a checkpoint is opened."""
    return open(path, mode)


class _Summing:
    """A file being written, with the checksum of what was written since ``restart``."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.position, self.crc32 = file, 0, 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        size = memoryview(data).nbytes
        try:
            self._file.write(data)
        except OSError as error:
            self._error = error
            raise
        self.position += size
        return size

    def save(self, chunk: torch.Tensor) -> None:
        """Write it as torch does; where the file system fails, its own error is raised, which torch would hide."""
        try:
            torch.save(chunk, self)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise self._error or error from None

    def flush(self) -> None:
        self._file.flush()

    def restart(self) -> None:
        self.crc32 = 0


def write_pieces(
    folder: Path,
    rank: int,
    pieces: Iterable[Piece],
    files: int = 1,
    reading: Callable[[], AbstractContextManager[Read]] = lambda: nullcontext(torch.Tensor.cpu),
) -> list[Record]:
    """Write one rank's files and sync them.  Pieces on the CPU take no memory, others that for a chunk of each file.

    Args:
        files: how many are written at a time, each by a thread of its own where there are several.
        reading: around what such a thread does; gives what reads a tensor on any device, until it reads the next.
    """
    rest, turn, failed = iter(pieces), Lock(), Event()

    def next_piece() -> Piece | None:
        with turn:
            return None if failed.is_set() else next(rest, None)

    def write(number: int) -> list[Record]:
        try:
            with reading() as read:
                return _write(folder, f"__{rank}_{number}.distcp", next_piece, read)
        except BaseException:
            failed.set()
            raise

    if files == 1:
        return write(0)
    with ThreadPoolExecutor(files, "checkpoint file") as pool:
        return [record for written in pool.map(write, range(files)) for record in written]


def _write(folder: Path, name: str, next_piece: Callable[[], Piece | None], read: Read) -> list[Record]:
    """One file, if there is a piece left for it."""
    records, piece = [], next_piece()
    if piece is None:
        return []
    with open_file(folder / name, "wb") as file:
        out = _Summing(file)
        while piece is not None:
            values = piece.read().detach()
            most = max(1, _MOST // values.element_size())
            for box in piece.region.boxes(piece.start, piece.start + piece.numel, most):
                chunk = values[box.start - piece.start : box.end - piece.start].view(box.sizes)
                position = out.position
                out.restart()
                out.save(_alone(read(chunk)))
                dtype = str(piece.dtype).removeprefix("torch.")
                records.append(
                    Record(
                        piece.name, list(piece.region.whole), dtype, list(box.offsets), list(box.sizes), name, position,
                        out.position - position, out.crc32,
                    )
                )  # fmt: skip
            del values, piece  # a copy goes when it is written
            piece = next_piece()
        _finish(file)
    return records


def _alone(chunk: torch.Tensor) -> torch.Tensor:
    """The same without the rest of the memory it is a view of, all of which torch.save would write."""
    flat = chunk.reshape(-1)
    return torch.frombuffer(flat.view(torch.uint8).numpy(), dtype=chunk.dtype).view(chunk.shape)


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def finish(
    folder: Path, tensors: Mapping[str, Any], records: Sequence[Record], paths: Mapping[str, Any], facts: dict[str, Any]
) -> None:
    """Write what makes the ranks' files a checkpoint; ``.metadata`` comes last.

    Args:
        tensors: shape and dtype of every tensor by name, those without elements included.
        records: of all ranks.
        paths: where each tensor is in the tree that was saved.
        facts: for the manifest.
    """
    found: dict[str, TensorStorageMetadata] = {
        name: TensorStorageMetadata(TensorProperties(dtype=getattr(torch, dtype)), torch.Size(shape), [])
        for name, (shape, dtype) in tensors.items()
    }
    places, files = {}, dict[str, list[list[int]]]()
    for record in records:
        known = found[record.name]
        assert [list(known.size), str(known.properties.dtype)] == [record.shape, f"torch.{record.dtype}"], record
        index = MetadataIndex(record.name, record.offsets, len(known.chunks))
        known.chunks.append(ChunkStorageMetadata(torch.Size(record.offsets), torch.Size(record.sizes)))
        places[index] = _StorageInfo(record.file, record.position, record.length)
        files.setdefault(record.file, []).append([record.position, record.length, record.crc32])
    for name, known in found.items():
        assert sum(prod(chunk.sizes) for chunk in known.chunks) == prod(known.size), f"{name} is not written whole"
    metadata = Metadata(dict(found), dict(paths), places, StorageMeta(), "1.0.0")
    data = pickle.dumps(metadata)
    content = json.dumps(
        {**facts, "files": files, "metadata": {"length": len(data), "crc32": zlib.crc32(data)}}, sort_keys=True
    )
    for name, written in ((MANIFEST, _manifest(FORMAT, content)), (METADATA, data)):
        with open_file(folder / name, "wb") as file:
            file.write(written)
            _finish(file)
        sync_folder(folder)


def _manifest(version: Any, content: str) -> bytes:
    head = json.dumps({"format": version, "crc32": zlib.crc32(f"{version}{content}".encode())})
    return f"{head}\n{content}\n".encode()


class _Unpickler(pickle.Unpickler):
    """Reads a ``.metadata``, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)):
            return getattr(torch, name)
        if module == "torch.serialization" and name == "_get_layout":
            return super().find_class(module, name)
        known = {
            "torch.distributed.checkpoint.metadata": {
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
            },
            "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
            "collections": {"OrderedDict"},
            "pathlib": {"PosixPath", "PurePosixPath"},
        }  # fmt: skip
        if name in known.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint's metadata does")


def _member(kind: object, name: object) -> Enum:
    """What stands for getattr, by which Python 3.11.0 to 3.11.3 pickle members of enumerations; of those alone."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it holds getattr({kind!r}, {name!r}), which no checkpoint's metadata does")
    return kind[name]


class _Reader(FileSystemReader):
    """Verifies every chunk that it reads."""

    def __init__(self, folder: Path, sums: Mapping[tuple[str, int], tuple[int, int]]) -> None:
        super().__init__(folder)
        self._sums = sums
        self._last: tuple[tuple[str, int], bytes] | None = None

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        key = (sinfo.relative_path, sinfo.offset)
        if self._last is None or self._last[0] != key:  # neighbours often want parts of one chunk
            file.seek(sinfo.offset)
            data = file.read(sinfo.length)
            if self._sums.get(key) != (sinfo.length, zlib.crc32(data)) or len(data) != sinfo.length:
                raise CheckpointError(
                    f"{Path(self.path, sinfo.relative_path)} is damaged: the {sinfo.length} bytes from {sinfo.offset} "
                    "on are not those that were written."
                )
            self._last = key, data
        return io.BytesIO(self._last[1])


class _Into(DefaultLoadPlanner):
    """Where what is read goes: boxes of targets, by name and offsets."""

    def __init__(self) -> None:
        super().__init__()
        self._boxes: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.items: list[ReadItem] = []

    def add(self, name: str, known: TensorStorageMetadata, region: Region, start: int, out: torch.Tensor) -> None:
        chunks = []
        for box in region.boxes(start, start + out.numel(), _ALL):
            self._boxes[name, box.offsets] = out[box.start - start : box.end - start].view(box.sizes)
            chunks.append(ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)))
        self.items += create_read_items_for_chunk_list(name, known, chunks)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        target = self._boxes[index.fqn, tuple(index.offset or ())]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class Stored:
    """A checkpoint that is whole, to be read.

    Attributes:
        facts: of the manifest.
        tensors: what is known of every tensor, by name.

    Raises CheckpointError that names the file when there is none, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.facts = self._manifest()
        data = self._bytes(METADATA)
        expected = self.facts["metadata"]
        if (len(data), zlib.crc32(data)) != (expected["length"], expected["crc32"]):
            raise CheckpointError(f"{self.folder / METADATA} is damaged: its checksum is not that in {MANIFEST}.")
        try:
            self._metadata: Metadata = _Unpickler(io.BytesIO(data)).load()
        except Exception as error:  # whatever kind unpickling raises
            raise CheckpointError(f"{self.folder / METADATA} cannot be read: {error}") from error
        self.tensors: dict[str, TensorStorageMetadata] = dict(self._metadata.state_dict_metadata)
        self._sums = {
            (file, position): (length, crc32)
            for file, chunks in self.facts["files"].items()
            for position, length, crc32 in chunks
        }

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not (self.folder / METADATA).exists():
            raise CheckpointError(f"{self.folder} is no whole checkpoint: it has no {METADATA}.")
        data = self._bytes(MANIFEST)
        try:
            head, content, _ = data.decode().split("\n")
            version = json.loads(head)["format"]
            facts = json.loads(content)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if data != _manifest(version, content):
            raise CheckpointError(f"{path} is damaged: its checksum is not that of its content.")
        if version != FORMAT:
            raise CheckpointError(f"{path} is of format {version}; this version of bmtrain reads {FORMAT}.")
        return facts  # type: ignore[no-any-return]

    def _bytes(self, name: str) -> bytes:
        try:
            with open_file(self.folder / name, "rb") as file:
                return file.read()
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error

    @property
    def paths(self) -> dict[str, Any]:
        """Where each tensor was in the tree that was saved."""
        return dict(self._metadata.planner_data)

    def read(self, targets: Iterable[tuple[str, Region, int, torch.Tensor]]) -> None:
        """Fill CPU tensors, each with the elements of a name from a first one of a flattened region on."""
        reader, into = _Reader(self.folder, self._sums), _Into()
        reader.set_up_storage_reader(self._metadata, False)
        for name, region, start, out in targets:
            into.add(name, self.tensors[name], region, start, out)
        places = self._metadata.storage_data
        into.items.sort(key=lambda item: (places[item.storage_index].relative_path, places[item.storage_index].offset))
        try:
            reader.read_data(LoadPlan(into.items), into)
        except CheckpointError:
            raise
        except Exception as error:  # of the system's or of torch's many kinds
            raise CheckpointError(f"{self.folder} cannot be read: {type(error).__name__}: {error}") from error

    def whole(self, name: str) -> torch.Tensor:
        """One tensor, all of it."""
        known = self.tensors[name]
        out = torch.empty(known.size, dtype=known.properties.dtype, device="cpu")
        self.read([(name, Region.of(known.size), 0, out.view(-1))])
        return out

    def check_sizes(self, files: Iterable[str] | None = None) -> None:
        """Raises CheckpointError for a file that is missing, too short or too long."""
        for file in self.facts["files"] if files is None else files:
            size = max(position + length for position, length, _ in self.facts["files"][file])
            try:
                found = (self.folder / file).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from error
            if found != size:
                raise CheckpointError(f"{self.folder / file} is damaged: it has {found} bytes, {size} were written.")

    def problems(self) -> Iterator[str]:
        """What is wrong with the files, all of which are read."""
        for file, chunks in sorted(self.facts["files"].items()):
            try:
                self.check_sizes([file])
                with open_file(self.folder / file, "rb") as opened:
                    for position, length, crc32 in sorted(chunks):
                        opened.seek(position)
                        if zlib.crc32(opened.read(length)) != crc32:
                            yield f"{self.folder / file} is damaged in the {length} bytes from {position} on."
            except (CheckpointError, OSError) as error:
                yield str(error)
