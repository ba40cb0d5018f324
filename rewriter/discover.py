"""Which files belong to a project: given paths, minus what is ignored, generated or another project's."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pathspec import GitIgnoreSpec

from rewriter.imported import imported
from rewriter.types import InputError

SKIPPED_FOLDERS = {
    ".git", ".hg", ".svn", ".tox", ".nox", ".eggs", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__",
    "node_modules", "site-packages", ".venv", "venv", ".ipynb_checkpoints", "build", "dist",
}  # fmt: skip
_BUILT = {"build", "dist"}
SUFFIXES = {".py", ".ipynb"}
Tell = Callable[[str, int, int], None]
"""Told of what is being done, how many are done, and of how many."""


class Ignored:
    """What ``.gitignore`` names, in the folder, below it, and above it as far as its repository goes; each read once.

    Who asks for a folder that is itself ignored means it: then what is above does not count.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self._given = root
        self._specs: dict[Path, GitIgnoreSpec] = {}
        above = _repository_above(self.root)
        chain = [*above[1:], self.root] if above else []
        is_meant = any(self._is_ignored(each, True, [base for base in above if base in each.parents]) for each in chain)
        self._above = [] if is_meant else above

    def __call__(self, path: Path, folder: bool) -> bool:
        inside = self.root / path.relative_to(self._given)
        below = [place for place in reversed(inside.parents) if place == self.root or self.root in place.parents]
        return self._is_ignored(inside, folder, [*self._above, *below])

    def _is_ignored(self, path: Path, folder: bool, bases: Sequence[Path]) -> bool:
        """The last word is that of the nearest folder that has one."""
        for base in reversed(bases):
            said = self._spec(base).check_file(path.relative_to(base).as_posix() + "/" * folder).include
            if said is not None:
                return said
        return False

    def _spec(self, folder: Path) -> GitIgnoreSpec:
        if folder not in self._specs:
            named, lines = folder / ".gitignore", list[str]()
            with suppress(OSError):
                if named.is_file():
                    lines = named.read_text(encoding="utf-8", errors="replace").splitlines()
            self._specs[folder] = GitIgnoreSpec.from_lines(filter(_is_pattern, lines))
        return self._specs[folder]


def _repository_above(root: Path) -> list[Path]:
    """The folders above, from the top of the repository on; none where this is the top, or no repository."""
    if (root / ".git").exists():
        return []
    parents = [*root.parents]
    top = next((number for number, place in enumerate(parents) if (place / ".git").exists()), -1)
    return parents[: top + 1][::-1]


def _is_pattern(line: str) -> bool:
    """Whether git makes something of a line; what it does not, it passes over."""
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def walk(
    root: Path,
    exclude: tuple[str, ...] = (),
    skip: Path | None = None,
    everything: bool = False,
    left_out: list[Path] | None = None,
) -> Iterator[Path]:
    """Every file of a folder that is its project's own, in a stable order; no device or FIFO, and links to files only.

    ``everything`` includes what a copy needs: data and settings that ``.gitignore`` names, links to folders, and
    folders in which there is nothing. ``left_out`` is given what ``.gitignore`` names, and folders
    for what is built.
    """
    ignored = _nothing if everything else Ignored(root)
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        if everything:
            yield from (here / name for name in sorted(folders) if (here / name).is_symlink())
        inside = sorted(folders)
        folders[:] = [name for name in inside if _enters(here / name, ignored, exclude, root, skip)]
        if left_out is not None:
            others = [here / name for name in inside if name not in folders and name not in SKIPPED_FOLDERS - _BUILT]
            left_out += [place for place in others if _enters(place, _nothing, exclude, root, skip, _BUILT)]
        for name in sorted(files):
            path = here / name
            if _excluded(path, exclude, root) or not (path.is_symlink() or path.is_file()):
                continue
            if not ignored(path, False):
                yield path
            elif left_out is not None and path.suffix == ".py":
                left_out.append(path)
        if everything and not folders and not files and here != root:
            yield here


def _nothing(path: Path, folder: bool) -> bool:
    return False


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path of a folder is a link to no file, or to one outside of the folder."""
    if not path.is_symlink():
        return False
    return not path.is_file() or Path(os.path.realpath(root)) not in Path(os.path.realpath(path)).parents


def _enters(
    folder: Path,
    ignored: Callable[[Path, bool], bool],
    exclude: tuple[str, ...],
    root: Path,
    skip: Path | None,
    though: Collection[str] = (),
) -> bool:
    """Whether a folder is its project's own; ``though`` are names that do not speak against it here."""
    skipped = folder.name in SKIPPED_FOLDERS and folder.name not in though
    if skipped or folder.is_symlink() or (folder / "pyvenv.cfg").exists():
        return False
    if skip is not None and folder.resolve() == skip:
        return False
    return not ignored(folder, True) and not _excluded(folder, exclude, root)


def _excluded(path: Path, exclude: tuple[str, ...], root: Path) -> bool:
    name = path.relative_to(root).as_posix()
    exclude = tuple(pattern.removeprefix("./").rstrip("/") for pattern in exclude)
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(path.name, pattern) for pattern in exclude)


def _says_python(path: Path) -> bool:
    """Whether a file without a suffix starts with ``#!/usr/bin/env python3`` or the like."""
    if path.suffix:
        return False
    try:
        with path.open("rb") as stream:
            first = stream.readline(256)
    except OSError:
        return False
    return first.startswith(b"#!") and b"python" in first


def excludes(pattern: str, paths: Sequence[Path]) -> bool:
    """Whether something in the folders among ``paths`` has a name that ``pattern`` fits."""
    return any(
        _excluded(Path(folder) / name, (pattern,), path)
        for path in paths
        for folder, folders, files in os.walk(path)
        for name in (*folders, *files)
    )


def sources(
    path: Path, exclude: tuple[str, ...] = (), skip: Path | None = None, tell: Tell | None = None
) -> list[Path]:
    """The Python files and notebooks of a path, without links that lead out of it.

    What is left out, as ``.gitignore`` names it or as it lies in a folder for what is built, belongs to it where files
    of the path import it.

    Raises:
        InputError: the path is missing, is neither file nor folder, or holds no Python.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise InputError(f"{path}: neither a file nor a folder; give code from a pipe on standard input, by -")
    left_out: list[Path] = []
    found = []
    for item in walk(path, exclude, skip, left_out=left_out):
        if not leads_out(item, path) and (item.suffix in SUFFIXES or _says_python(item)):
            found.append(item)
            if tell is not None:
                tell("looking for files", len(found), 0)
    found += _asked_for(found, left_out, path, exclude, skip)
    if not found:
        raise InputError(f"{path}: no Python files in this folder")
    return found


def _asked_for(
    found: Sequence[Path], left_out: list[Path], root: Path, exclude: tuple[str, ...], skip: Path | None
) -> list[Path]:
    """The files among what was left out that those found import, and that these import in turn."""
    more: list[Path] = []
    new = list(found)
    while left_out and (taken := imported(new, left_out, root)):
        left_out = [place for place in left_out if place not in taken]
        new = [file for place in taken for file in _code_in(place, exclude, root, skip) if not leads_out(file, root)]
        more += new
    return more


def _code_in(place: Path, exclude: tuple[str, ...], root: Path, skip: Path | None) -> Iterator[Path]:
    if place.is_file():
        yield place
    for folder, folders, files in os.walk(place):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if _enters(here / name, _nothing, exclude, root, skip))
        yield from (here / name for name in sorted(files) if Path(name).suffix == ".py")
