"""Distances between what two models gave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

NOISE = 1e-6
"""A gradient smaller than this part of the largest gradient is rounding error (its true value is 0, as that of a key
projection's bias), and so is a trained weight that began at 0 and had only such gradients: their differences are
measured against the largest entry of all tensors instead of against themselves."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Distance:
    """Between two leaves. ``why`` says in words how they differ when numbers do not."""

    path: str
    ulp: float = 0.0
    relative: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two recordings, leaf by leaf. ``compared`` counts leaves that hold something finite to compare."""

    compared: int = 0
    ulp: float = 0.0
    relative: float = 0.0
    different: tuple[Distance, ...] = field(default=())

    def worst(self) -> Distance | None:
        """The leaf that differs most; one that differs in more than numbers before all others."""
        return max(self.different, key=lambda d: (bool(d.why), d.relative), default=None)


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float, noise: bool = False) -> Comparison:
    """``theirs`` against ``ours``, the original's.

    Args:
        tolerance: largest relative difference of a tensor, measured against its largest entry, that is no difference.
        noise: the leaves are gradients or trained weights, of which some may be rounding error.
    """
    top = max((_size(leaf) for leaf in ours.values()), default=0.0) if noise else 0.0
    ulp = relative = 0.0
    compared, different = 0, []
    for path in [*ours, *(path for path in theirs if path not in ours)]:
        if path not in ours or path not in theirs:
            why = "only in the original" if path in ours else "only in the converted"
            different.append(Distance(path, why=why))
            continue
        distance = distance_of(path, ours[path], theirs[path], top)
        compared += _holds_something(ours[path]) and not path.endswith("<type>")
        ulp, relative = max(ulp, distance.ulp), max(relative, distance.relative)
        if distance.why or distance.relative > tolerance:
            different.append(distance)
    return Comparison(compared, ulp, relative, tuple(different))


def merge(one: Comparison, other: Comparison) -> Comparison:
    """Both, as when several ranks gave the same thing."""
    ulp, relative = max(one.ulp, other.ulp), max(one.relative, other.relative)
    return Comparison(min(one.compared, other.compared), ulp, relative, one.different + other.different)


def first_difference(
    ours: list[tuple[str, dict[str, Any]]], theirs: list[tuple[str, dict[str, Any]]], tolerance: float
) -> tuple[str, Distance, Any] | None:
    """The first module, in the order in which the original's return, whose output differs."""
    calls: dict[str, Iterator[dict[str, Any]]] = {}
    for name, _ in theirs:
        calls.setdefault(name, iter([leaves for other, leaves in theirs if other == name]))
    for name, leaves in ours:
        other = next(calls.get(name, iter(())), None)
        if other is None:
            return name, Distance(name, why="is called in the original only"), (name, leaves, None)
        worst = compare(leaves, other, tolerance).worst()
        if worst is not None:
            return name, worst, (worst.path, leaves.get(worst.path), other.get(worst.path))
    return None


def distance_of(path: str, ours: Any, theirs: Any, top: float = 0.0) -> Distance:
    """Between two leaves. ``top``: the largest entry of all leaves if some may be rounding error, else 0."""
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return Distance(path, why="" if _same(ours, theirs) else f"{_show(ours)} became {_show(theirs)}")
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Distance(path, why=f"{_show(ours)} became {_show(theirs)}")
    if ours.is_complex():
        ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
    if not ours.is_floating_point():
        wrong = int((ours != theirs).sum())
        return Distance(path, why=f"{wrong} of {ours.numel()} entries differ" if wrong else "")
    if bool((ours.isfinite() != theirs.isfinite()).any()):
        return Distance(path, math.inf, math.inf, "NaN or infinite in one only")
    finite = ours.isfinite()
    if not bool(torch.equal(ours[~finite].nan_to_num(), theirs[~finite].nan_to_num())):
        return Distance(path, math.inf, math.inf, "infinities differ")
    a, b = ours[finite], theirs[finite]
    if not a.numel() or torch.equal(a, b):
        return Distance(path)
    largest = float(a.abs().max())
    scale = top if largest < NOISE * top else largest
    error = float((a.double() - b.double()).abs().max())
    return Distance(path, _ulp(a, b), error / scale if scale else math.inf)


def _ulp(a: torch.Tensor, b: torch.Tensor) -> float:
    """The most representable numbers that lie between two entries."""
    kind = _INTEGERS[a.element_size()]

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(kind)
        lowest = torch.iinfo(kind).min  # a negative number's bits grow as it falls
        return torch.where(bits < 0, lowest - bits.long(), bits.long())

    one, other = ordered(a), ordered(b)
    far = (one.double() - other.double()).abs()  # rounded for 64 bits, where the exact difference may not fit
    return float(torch.where(far < 2.0**52, (one - other).abs().double(), far).max())


def _size(leaf: Any) -> float:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or not leaf.numel():
        return 0.0
    return float(leaf.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _holds_something(leaf: Any) -> bool:
    if isinstance(leaf, torch.Tensor):
        return bool(leaf.numel()) and (not leaf.is_floating_point() or bool(leaf.isfinite().any()))
    return leaf is not None


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return ours == theirs or (math.isnan(ours) and math.isnan(theirs))
    return type(ours) is type(theirs) and bool(ours == theirs)


def _show(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf)[:60]
