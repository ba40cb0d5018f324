"""``bmt-checkpoint``, also ``python -m bmtrain.checkpoint``: look at checkpoints, without GPUs and without ranks."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import sys
import uuid
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CheckpointError
from ..log import interruptible
from ..wire import to_bytes
from ..written import replacing
from . import folder as folders
from . import storage
from .boxes import Region
from .safetensors import NAMES
from .sharded import VALUES, StoredState, load_sharded
from .storage import RANK, STATE, Piece, Stored
from .torch_file import with_room
from .tree import decode, encode


def parser(**options: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        description="Checkpoints of bmtrain's Checkpointer.", **{"prog": "bmt-checkpoint", **options}
    )
    commands = top.add_subparsers(dest="command", required=True)
    known = {
        "inspect": "what is in a checkpoint", "verify": "whether all its files are what was written",
        "diff": "how two checkpoints or files differ", "convert": "to a plain file, or from one",
    }  # fmt: skip
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in known.items()}
    for name in ("inspect", "verify"):
        made[name].add_argument("path", type=Path, help="a checkpoint, or a folder of them (the newest is taken)")
    made["inspect"].add_argument("--tensors", action="store_true", help="list every tensor")
    for name in ("path", "other"):
        made["diff"].add_argument(name, type=Path, help="a checkpoint, a folder of them, or a file of torch.save")
    made["convert"].add_argument("path", type=Path, help="a checkpoint, or a file of torch.save with a state dict")
    made["convert"].add_argument("out", type=Path, help="a .pt or .safetensors file; of a file, a folder")
    made["convert"].add_argument(
        "--part", default="model", help='what of it: "model" (the default), "optimizer"..., or "all"'
    )
    return top


@interruptible("bmt-checkpoint")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  0: done, and nothing is wrong or different; 1: something is; 2: it could not be done."""
    given = parser().parse_args(arguments)
    try:
        return {"inspect": _inspect, "verify": _verify, "diff": _diff, "convert": _convert}[given.command](given)
    except (CheckpointError, OSError) as error:
        print(f"bmt-checkpoint: {error}", file=sys.stderr)
        return 2


def _open(path: Path) -> Stored:
    """The checkpoint at ``path``, or the newest whole one in it."""
    if not (path / storage.METADATA).exists():
        found = folders.steps(path)
        if not found:
            raise CheckpointError(f"{path} is no whole checkpoint, and no folder that holds one.")
        path = folders.path_of(path, found[0])
    return Stored(path)


def state_of(stored: Stored, tensor: Any) -> Any:
    """The tree that was saved, with ``tensor(path, name)`` for each tensor."""
    if STATE not in stored.tensors:
        raise CheckpointError(f"{stored.folder} was not written by bmt.checkpoint.Checkpointer: it has no {STATE}.")
    return decode(stored.whole(STATE).numpy().tobytes().decode(), tensor)


def _sizes(stored: Stored) -> dict[str, tuple[list[int], str, int]]:
    """Shape, dtype and bytes of every tensor, by name."""
    return {
        name: (list(one.size), str(one.properties.dtype).removeprefix("torch."),
               one.size.numel() * one.properties.dtype.itemsize)
        for name, one in sorted(stored.tensors.items())
        if name != STATE and not name.startswith(RANK)
    }  # fmt: skip


def _inspect(given: argparse.Namespace) -> int:
    if (others := folders.steps(given.path)) and not (given.path / storage.METADATA).exists():
        print(f"whole checkpoints of steps {', '.join(map(str, sorted(others)))}")
    stored = _open(given.path)
    versions = ", ".join(f"{name} {version}" for name, version in stored.facts["versions"].items())
    print(f"{stored.folder}: step {stored.facts['step']}, written by {stored.facts['world_size']} ranks, {versions}")
    sizes, parts = _sizes(stored), dict[str, list[int]]()
    for name, (_, _, size) in sizes.items():
        parts.setdefault(str(stored.paths[name][0]), []).append(size)
    for part, found in parts.items():
        print(f"  {part}: {len(found)} tensors, {sum(found) / 2**20:.1f} MiB")
    plain = state_of(stored, lambda path, name: "...")
    print(f"  also: {', '.join(name for name in plain if name not in parts) or 'nothing'}")
    if given.tensors:
        for name, (shape, dtype, size) in sizes.items():
            print(f"{name}  {tuple(shape)}  {dtype}  {size} bytes in {len(stored.tensors[name].chunks)} chunks")
    return 0


def _verify(given: argparse.Namespace) -> int:
    stored = _open(given.path)
    problems = list(stored.problems())
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{stored.folder}: {len(stored.facts['files'])} files, every byte is as it was written")
    return 1 if problems else 0


class _File:
    """A file of torch.save, whose tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of many kinds
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        self.tensors: dict[str, Any] = {}
        self.state = state
        encode(state, self.tensors, {}, lambda value: False)

    def whole(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.tensors[name]  # type: ignore[no-any-return]


def _diff(given: argparse.Namespace) -> int:
    one, other = (_File(path) if path.is_file() else _open(path) for path in (given.path, given.other))
    names = [{n.removeprefix("model.") if isinstance(o, _File) != isinstance(p, _File) else n: n for n in o.tensors}
             for o, p in ((one, other), (other, one))]  # fmt: skip
    ours, theirs = ({k: v for k, v in found.items() if v != STATE and not v.startswith(RANK)} for found in names)
    differing = 0
    for name in sorted(ours.keys() | theirs.keys()):
        said = _difference(one, ours.get(name), other, theirs.get(name))
        if said:
            differing += 1
            print(f"{name}: {said}")
    print(f"{differing} of {len(ours.keys() | theirs.keys())} tensors differ")
    return 1 if differing else 0


def _difference(one: Any, name: str | None, other: Any, same: str | None) -> str | None:
    if name is None or same is None:
        return "only in the second" if name is None else "only in the first"
    a, b = one.whole(name), other.whole(same)
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}"
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs().max()
    return f"differs by up to {float(gap):.3g}"


def _convert(given: argparse.Namespace) -> int:
    if given.path.is_file():
        _from_file(_File(given.path), given.out)
    else:
        stored = _open(given.path)
        tree = state_of(stored, lambda path, name: _Name(name))
        if given.part != "all" and given.part not in tree:
            raise CheckpointError(f"{stored.folder} has no {given.part}, only {', '.join(tree)}.")
        if given.part == "all" and VALUES in tree:
            return _to_script_file(given.path, given.out)
        part = tree if given.part == "all" else tree[given.part]
        with replacing(given.out) as temporary:
            (_to_safetensors if given.out.suffix == ".safetensors" else _to_torch)(stored, part, temporary)
    print(f"wrote {given.out}")
    return 0


def _to_script_file(path: Path, out: Path) -> int:
    """What the script would have saved by ``torch.save``; all of it is in memory."""
    try:
        state = load_sharded(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, which reading could run as code. If you trust whoever "
            f"wrote it: torch.save(bmt.checkpoint.load_sharded(path, weights_only=False), out)."
        ) from error
    with replacing(out) as temporary:
        torch.save({k: v.copy() if isinstance(v, StoredState) else v for k, v in state.items()}, temporary)
    print(f"wrote {out}")
    return 0


class _Name(str):
    """Of a tensor, in its place in a tree."""


def _mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, _Name):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree


def _to_torch(stored: Stored, tree: Any, path: Path) -> None:
    """First the file with empty places for tensors, then each of them: one is in memory at a time."""
    made: dict[str, torch.Tensor] = {}

    def empty(name: str) -> torch.Tensor:
        if name not in made:
            known = stored.tensors[name]
            made[name] = torch.empty(known.size, dtype=known.properties.dtype, device="cpu")
        return made[name]

    with FakeTensorMode():
        shapes = _mapped(tree, empty)
    filled: set[str] = set()

    def fill(place: Any, names: Any) -> None:
        if isinstance(names, _Name):
            if names not in filled and place.numel():
                place.copy_(stored.whole(names))
            filled.add(names)
        elif isinstance(names, dict):
            for key, name in names.items():
                fill(place[key], name)
        elif isinstance(names, (list, tuple)):
            for inner, name in zip(place, names, strict=True):
                fill(inner, name)

    fill(with_room(path, shapes), tree)


def _to_safetensors(stored: Stored, tree: Any, path: Path) -> None:
    """The format is a header in JSON and the tensors' bytes; names are joined by dots."""
    tensors: dict[str, _Name] = {}
    seen: set[str] = set()

    def collect(value: Any, name: str) -> None:
        if isinstance(value, _Name) and value not in seen:  # the format has no tied tensors
            seen.add(value)
            tensors[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                collect(inner, f"{name}.{number}" if name else str(number))

    collect(tree, "")
    header, at = {}, 0
    for name, stored_name in tensors.items():
        known = stored.tensors[stored_name]
        if known.properties.dtype not in NAMES:
            raise CheckpointError(f"{name} is {known.properties.dtype}, for which safetensors has no name here.")
        size = prod(known.size) * known.properties.dtype.itemsize
        header[name] = {
            "dtype": NAMES[known.properties.dtype], "shape": list(known.size), "data_offsets": [at, at + size]
        }  # fmt: skip
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for stored_name in tensors.values():
            whole = stored.whole(stored_name)
            if whole.numel():
                file.write(whole.reshape(-1).view(torch.uint8).numpy().data)


def _from_file(file: _File, folder: Path) -> None:
    """A checkpoint of step 0 that holds a model."""
    tensors: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    text = encode({"model": file.state}, tensors, paths, lambda value: False)
    own = to_bytes({"generators": None, "data": {}})
    for name, content in ((STATE, text.encode()), (f"{RANK}0", own)):
        tensors[name], paths[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8), (name,)
    folder.mkdir(parents=True, exist_ok=True)
    written = folders.writing_path(folder, 0, uuid.uuid4().hex[:12])
    written.mkdir()
    pieces = [
        Piece(n, Region.of(t.shape), t.dtype, 0, t.numel(), lambda t=t: t.detach().reshape(-1))  # type: ignore[misc]
        for n, t in tensors.items()
        if t.numel()
    ]
    records = storage.write_pieces(written, 0, pieces)
    known = {n: (list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()}
    facts = {"step": 0, "world_size": 1, "versions": {"torch": torch.__version__}}
    storage.finish(written, known, records, paths, facts)
    folders.commit(written, folders.path_of(folder, 0))
