"""What two runs of a script printed and wrote, compared."""

from __future__ import annotations

import math
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_NEAR = 2e-3
_TENSORS = {".pt", ".pth", ".bin", ".tar"}


def differences(before: Path, after: Path, printed: str, printed_after: str, without: set[str]) -> list[str]:
    """The first differences, a line each."""
    found = [f"printed: {line}" for line in _texts(printed, printed_after)]
    one, two = _files(before, without), _files(after, without)
    found += [f"{name} is not there" for name in one.keys() - two.keys()]
    found += [f"{name} is new" for name in two.keys() - one.keys()]
    for name in sorted(one.keys() & two.keys()):
        found += [f"{name}: {line}" for line in _values(_load(one[name]), _load(two[name]), "")][:4]
    return found[:12]


def _files(folder: Path, without: set[str]) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc", ".png"})
    return {str(p.relative_to(folder)): p for p in paths if p.name not in without}


def _load(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))
    try:
        if path.suffix in _TENSORS:
            return torch.load(path, weights_only=False, map_location="cpu")
        if path.suffix in {".npy", ".npz"}:
            loaded = numpy.load(path, allow_pickle=True)
            return dict(loaded) if path.suffix == ".npz" else loaded
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # only where a project's own packages bring it

            return load_file(path)
        if zipfile.is_zipfile(path):
            return torch.load(path, weights_only=False, map_location="cpu")  # a checkpoint, whatever its suffix
        if path.suffix == ".pkl":
            return pickle.loads(path.read_bytes())
    except (AttributeError, ModuleNotFoundError):
        return None  # an object of a class of the script's own
    finally:
        sys.path.pop(0)
    return path.read_text(errors="replace")


def _texts(one: str, two: str) -> list[str]:
    left, right = ([line for line in text.splitlines() if line.strip() and "time" not in line] for text in (one, two))
    found = [f"{len(left)} lines, then {len(right)}"] if len(left) != len(right) else []
    for a, b in zip(left, right, strict=False):
        alike = _NUMBER.sub("#", a) == _NUMBER.sub("#", b)
        pairs = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=False)
        if not alike or not all(_near(float(x), float(y)) for x, y in pairs):
            found.append(f"{a!r}, then {b!r}")
    return found


def _near(one: float, two: float) -> bool:
    return one == two or (math.isnan(one) and math.isnan(two)) or abs(one - two) <= _NEAR * max(1, abs(one))


def _values(one: Any, two: Any, place: str) -> list[str]:
    if isinstance(one, torch.Tensor | numpy.ndarray):
        if type(one) is not type(two) or one.shape != two.shape:
            return [f"{place} has another shape"]
        if isinstance(one, numpy.ndarray) and one.dtype.kind not in "biufc":
            return _values(one.tolist(), two.tolist(), place)
        a, b = torch.as_tensor(one).double(), torch.as_tensor(two).double()
        near = torch.allclose(a, b, rtol=_NEAR, atol=_NEAR, equal_nan=True)
        return [] if near else [f"{place} is off by {(a - b).abs().max():.2g}"]
    if isinstance(one, str) and isinstance(two, str):
        return _texts(one, two)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        found = [f"{place} has other keys"] if one.keys() != two.keys() else []
        return found + [line for key in one if key in two for line in _values(one[key], two[key], f"{place}.{key}")]
    if isinstance(one, Sequence) and isinstance(two, Sequence):
        found = [f"{place} has another length"] if len(one) != len(two) else []
        pairs = enumerate(zip(one, two, strict=False))
        return found + [line for index, (a, b) in pairs for line in _values(a, b, f"{place}[{index}]")]
    if isinstance(one, int | float) and isinstance(two, int | float):
        return [] if _near(one, two) else [f"{place} is {one}, then {two}"]
    return []
