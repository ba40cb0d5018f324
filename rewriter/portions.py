"""Cuts a large project into portions that are converted one after the other, each in a process of its own.

A portion reads the files that it converts and what they import; memory is bounded by the portion, not by the project.
Small projects are one portion, in this process.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from rewriter.analyze.read.file import base_names
from rewriter.convert import convert_paths
from rewriter.discover import Tell
from rewriter.plan import Options
from rewriter.types import Result

WHOLE = 16_000_000  # bytes of source up to which a project is one portion
PORTION = 5_000_000
_Task = tuple[list[Path], Options, list[Path], dict[bytes, list[Path]], frozenset[str]]


def convert_project(
    paths: Sequence[Path], options: Options, roots: Sequence[Path] = (), jobs: int = 1, tell: Tell | None = None
) -> list[Result]:
    """Results of all files, in the order given. ``jobs`` portions at a time."""
    sizes = {path: _size(path) for path in paths}
    if sum(sizes.values()) <= WHOLE:
        return convert_paths(paths, options, roots, tell)
    below = derived(paths)
    tasks: list[_Task] = [(portion, options, list(roots), below, frozenset()) for portion in cut(paths, sizes)]
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    found: list[list[Result]] = []
    if tell is not None:
        tell("converting", 0, len(paths))
    with multiprocessing.get_context(method).Pool(min(jobs, len(tasks)), _leave_interrupts, maxtasksperchild=1) as pool:
        for portion in pool.imap(_convert, tasks, chunksize=1):
            found.append(portion)
            if tell is not None:
                tell("converting", sum(map(len, found)), len(paths))
        absent = missing(result for portion in found for result in portion)
        if absent:
            again = [number for number, portion in enumerate(found) if relied_on(portion) & absent]
            repeated = pool.imap(_convert, [(*tasks[number][:4], absent) for number in again], chunksize=1)
            for number, portion in zip(again, repeated, strict=True):
                found[number] = portion
    return [result for portion in found for result in portion]


def relied_on(results: Iterable[Result]) -> set[str]:
    """Keys of findings that applied findings require."""
    return {key for result in results for finding in result.applied for key in finding.requires}


def missing(results: Iterable[Result]) -> frozenset[str]:
    """Keys that some portion took for granted and no portion applies."""
    every = list(results)
    made = {finding.key for result in every for finding in result.applied}
    return frozenset(relied_on(every) - made)


def _convert(task: _Task) -> list[Result]:
    paths, options, roots, below, absent = task
    return convert_paths(paths, options, roots, derived=below, absent=absent)


def _leave_interrupts() -> None:
    """Ctrl-C is for the process that has started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def derived(paths: Sequence[Path]) -> dict[bytes, list[Path]]:
    """Which files have classes with a base of some name."""
    found: dict[bytes, list[Path]] = {}
    for path in paths:
        try:
            names = base_names(path.read_bytes())
        except OSError:
            continue
        for name in names:
            found.setdefault(name, []).append(path.resolve())
    return found


def cut(paths: Sequence[Path], sizes: dict[Path, int]) -> list[list[Path]]:
    """Neighbours together, each portion of about the same size."""
    portions: list[list[Path]] = [[]]
    filled = 0
    for path in paths:
        if filled + sizes[path] > PORTION and portions[-1]:
            portions.append([])
            filled = 0
        portions[-1].append(path)
        filled += sizes[path]
    return portions
