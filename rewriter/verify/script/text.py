"""Lines of text whose numbers are compared as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]*[a-zA-Z_])|\bnan\b|\binf\b")
_LEFT_OUT = re.compile(
    r"\d+:\d\d(?::\d\d(?:\.\d+)?)?"  # of the day, or what is left
    r"|\d{4}-\d\d-\d\d"
    r"|[\d.]+ ?(?:s|ms|us|secs?|seconds?|mins?|minutes?|it/s|s/it|\w+/s(?:ec)?)\b"
    r"|\b(?:time|elapsed|took|eta|duration|speed|pid)\b\W{0,4}[\d.]+"
    r"|, grad_fn=<\w+>",  # the last step of a loss is a mean over the ranks
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Differing:
    """The first line that differs: its number, both texts, the largest difference of its numbers."""

    index: int
    ours: str
    theirs: str


@dataclass(frozen=True)
class Lines:
    """Two texts, compared: how many lines are the same."""

    compared: int
    largest: float
    different: tuple[Differing, ...]


class Origins:
    """Says which line of the original a line of the converted project comes from: ``train.py:12``, as users know it."""

    def __init__(self, original: Path, converted: Path) -> None:
        self._folders = original, converted
        self._known: dict[str, list[int]] = {}

    def __call__(self, at: str) -> str:
        path, _, line = at.rpartition(":")
        if path not in self._known:
            ours, theirs = (_read(folder / path) for folder in self._folders)
            self._known[path] = list(_origins(ours, theirs))
        numbers = self._known[path]
        return f"{path}:{numbers[int(line) - 1]}" if line.isdecimal() and 0 < int(line) <= len(numbers) else at


def _read(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _origins(ours: list[str], theirs: list[str]) -> Iterator[int]:
    """Of a line that was put in, the one before it."""
    for _, start, end, begin, stop in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if end - start == stop - begin:
            yield from range(begin + 1, stop + 1)
            continue
        last = begin
        for line in theirs[start:end]:
            alike = [(SequenceMatcher(None, line.strip(), ours[at].strip()).ratio(), -at) for at in range(last, stop)]
            if alike and max(alike)[0] > 0.5:
                last = 1 - max(alike)[1]
            yield max(1, last)


def compare_lines(
    ours: Sequence[str], theirs: Sequence[str], tolerance: float, again: Sequence[str] | None = None
) -> Lines:
    """Text must be the same, numbers nearly; what is said of the time, or of a graph, is left out.

    ``again`` is the text of the original's second run: numbers that it does not repeat are not compared either.
    """
    different, largest, compared = [], 0.0, 0
    for one, other in _paired([_to_compare(line) for line in ours], [_to_compare(line) for line in theirs]):
        if one is None or other is None:
            different.append(Differing(one if one is not None else len(ours), _line(ours, one), _line(theirs, other)))
            continue
        repeated = _to_compare(again[one]) if again is not None and one < len(again) else None
        distance = _distance(_to_compare(ours[one]), _to_compare(theirs[other]), tolerance, repeated)
        if distance > tolerance:
            different.append(Differing(one, ours[one], theirs[other]))
        else:
            compared += 1
            largest = max(largest, distance)
    return Lines(compared, largest, tuple(different))


def _line(lines: Sequence[str], index: int | None) -> str:
    return "(no line)" if index is None else lines[index]


def _paired(ours: list[str], theirs: list[str]) -> Iterator[tuple[int | None, int | None]]:
    if len(ours) == len(theirs):
        yield from ((index, index) for index in range(len(ours)))
        return
    texts = [NUMBER.sub("#", line) for line in ours], [NUMBER.sub("#", line) for line in theirs]
    for _, start, end, begin, stop in SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        for step in range(max(end - start, stop - begin)):
            yield (
                start + step if start + step < end else None,
                begin + step if begin + step < stop else None,
            )


def _to_compare(line: str) -> str:
    return _LEFT_OUT.sub("@", line)


def _distance(ours: str, theirs: str, tolerance: float, again: str | None) -> float:
    """The largest relative difference of two lines' numbers; infinite if their texts differ."""
    if ours == theirs:
        return 0.0
    if NUMBER.sub("#", ours).split() != NUMBER.sub("#", theirs).split():
        return math.inf
    one, two = NUMBER.findall(ours), NUMBER.findall(theirs)
    repeated = NUMBER.findall(again) if again is not None else one
    largest = 0.0
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        if index < len(repeated) and _apart(a, repeated[index]) > tolerance:
            continue  # the original does not repeat it
        largest = max(largest, _apart(a, b))
    return largest


def _apart(a: str, b: str) -> float:
    """Beyond what rounding to the digits that are shown explains."""
    x, y = float(a), float(b)
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.inf
    if "." not in a and "e" not in a.lower():
        return math.inf  # a count
    beyond = abs(x - y) - 1.5 * _digit(a)
    return max(0.0, beyond) / max(abs(x), 1e-12)


def _digit(number: str) -> float:
    mantissa, _, exponent = number.lower().partition("e")
    return float(10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])))
