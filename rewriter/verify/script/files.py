"""What runs left behind in their copies of the project, compared by kind."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewriter.verify.script import digests
from rewriter.verify.script.text import compare_lines


@dataclass
class Left:
    """What was compared, and what differs: path and how."""

    files: int = 0
    tensors: int = 0
    largest: float = 0.0
    different: list[tuple[str, str]] = field(default_factory=list)


def snapshot(root: Path) -> dict[str, str]:
    """Every file with a digest of its contents."""
    return {name: hashlib.blake2b((root / name).read_bytes()).hexdigest() for name in _names(root)}


def left_by(root: Path, before: Mapping[str, str]) -> list[str]:
    """Files that are new or not what they were."""
    return [name for name, digest in snapshot(root).items() if before.get(name) != digest]


def _names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            path = Path(folder) / name
            if path.is_file() and path.suffix != ".pyc":
                yield path.relative_to(root).as_posix()


def compare_left(
    ours: tuple[Path, list[str]],
    theirs: tuple[Path, list[str]],
    tolerance: float,
    slack: Mapping[tuple[Any, ...], float],
    again: Path | None = None,
) -> Left:
    """Two runs' files.

    Args:
        slack: by the digest of a trained weight, how far its rounding error may have led it.
        again: the folder of the original's second run, for numbers that it does not repeat.
    """
    found = Left()
    for one, other in _paired(ours[1], theirs[1]):
        if one is None or other is None:
            name = one or other or ""
            found.different.append((name, "is written by the original only" if one else "is written by converted only"))
            continue
        found.files += 1
        how = _compare(
            ours[0] / one, theirs[0] / other, tolerance, slack, found, None if again is None else again / one
        )
        if how:
            found.different.append((one, how))
    return found


def _paired(ours: list[str], theirs: list[str]) -> Iterator[tuple[str | None, str | None]]:
    """By name; names that only differ in digits (a time, a process id) by their order."""
    mine = {name: name for name in ours}
    others = set(theirs)
    loose: dict[str, list[str]] = {}
    for name in theirs:
        if name not in mine:
            loose.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    for name in ours:
        if name in others:
            yield name, name
        else:
            like = loose.get(re.sub(r"\d+", "#", name), [])
            yield name, like.pop(0) if like else None
    for names in loose.values():
        yield from ((None, name) for name in names)


def _compare(
    ours: Path, theirs: Path, tolerance: float, slack: Mapping[tuple[Any, ...], float], found: Left, again: Path | None
) -> str:
    """How two files differ, or nothing."""
    if ours.read_bytes() == theirs.read_bytes():
        return ""
    loaded = _loaded(ours)
    if loaded is not None:
        other = _loaded(theirs)
        return "is no file of torch's" if other is None else _compare_leaves(loaded, other, tolerance, slack, found)
    lines = _lines(ours), _lines(theirs)
    if lines[0] is None or lines[1] is None:
        return "" if theirs.stat().st_size else "is empty"
    repeated = _lines(again) if again is not None and again.exists() else None
    result = compare_lines(lines[0], lines[1], tolerance, repeated)
    found.largest = max(found.largest, result.largest)
    if not result.different:
        return ""
    first = result.different[0]
    return f"line {first.index + 1}: {_short(first.ours)} became {_short(first.theirs)}"


def _short(text: str) -> str:
    return repr(text if len(text) < 60 else text[:57] + "...")


def _loaded(path: Path) -> dict[str, Any] | None:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever it is, it is no file of plain tensors
        return None
    return dict(_leaves(value, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{path}[{index}]")
    else:
        yield path, value


def _compare_leaves(
    ours: dict[str, Any], theirs: dict[str, Any], tolerance: float, slack: Mapping[tuple[Any, ...], float], found: Left
) -> str:
    missing = [key for key in ours if key not in theirs] or [key for key in theirs if key not in ours]
    if missing:
        return f"{missing[0]} is in one file only" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
    for key, one in ours.items():
        other = theirs[key]
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if not _same(one, other, tolerance):
                return f"{key} is {_short(str(one))} and became {_short(str(other))}"
            continue
        found.tensors += 1
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{key} has another shape or type"
        distance = float((one.double() - other.double()).norm()) if not one.is_complex() else 0.0
        allowed = slack.get(_key(digests.of_tensor(one)), 0.0)
        relative = max(0.0, distance - allowed) / max(float(one.double().norm()), 1e-12)
        if not relative <= tolerance:
            return f"{key} differs by {relative:.1e}"
        found.largest = max(found.largest, relative)
    return ""


def _key(digest: list[Any]) -> tuple[Any, ...]:
    return tuple(map(str, digest))


def _same(ours: Any, theirs: Any, tolerance: float) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return ours == theirs or abs(ours - theirs) <= tolerance * max(abs(ours), 1e-12)
    return type(ours) is type(theirs) and bool(ours == theirs)


def _lines(path: Path) -> list[str] | None:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError):
        return None
