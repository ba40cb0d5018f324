"""Writes results: files in place, or a whole project to another folder. All of it is written, or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rewriter.convert import write_file
from rewriter.discover import walk
from rewriter.types import InputError, Result


@contextmanager
def uninterrupted(done: str) -> Iterator[None]:
    """Ctrl-C waits until what is inside is through, and then says what was done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt(done)


def write_back(results: Sequence[Result]) -> str:
    """Change the files in place; what was done, in words.

    Raises:
        InputError: a file is not what was read, or cannot be written. Then no file has changed.
    """
    changed = {result.path.resolve(): result for result in results if result.changed}
    for path, result in changed.items():
        if path.read_bytes() != result.before:
            raise InputError(f"{result.path}: changed while it was being converted; nothing was written")
    done = f"{len(changed)} file{'s' * (len(changed) != 1)} changed in place"
    staged: dict[Path, Path] = {}
    try:
        for path, result in changed.items():
            staged[path] = path.with_name(f".{path.name}.bmt-{os.getpid()}")
            write_file(staged[path], result.after, mode_of=path)
        with uninterrupted(done):
            for path, new in staged.items():
                os.replace(new, path)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; nothing was written") from None
    finally:
        for new in staged.values():
            new.unlink(missing_ok=True)
    return done


def check_target(paths: Sequence[Path], output: Path, force: bool) -> None:
    """Raises InputError where a project cannot be written to a folder, or only over what is there."""
    if any(path.resolve() == output.resolve() for path in paths):
        raise InputError(f"{output}: --output must not be the input; use --write to convert in place")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: --output is a file; give a folder")
    if not force and output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: not empty; --force writes into it, over files of the same names")


def write_tree(paths: Sequence[Path], output: Path, results: Sequence[Result]) -> str:
    """The projects whole, in a folder; what was done, in words. An interruption leaves the folder as it was.

    Raises:
        InputError: something cannot be written, or is in the way. Then the folder is as it was.
    """
    done = f"the project, converted, is in {output}"
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".bmt-convert-", dir=output))
        try:
            copy_project(paths, stage, results, output.resolve())
            files = sorted(path for path in stage.rglob("*") if not path.is_dir())
            names = [path.relative_to(stage) for path in files]
            for name in names:
                _check_place(output, name)
            with uninterrupted(done):
                made.clear()
                for name in names:
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(stage / name, output / name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; {output} is as it was") from None
    finally:
        for folder in made:
            if folder.exists():
                folder.rmdir()
    return done


def _check_place(output: Path, name: Path) -> None:
    if (output / name).is_dir():
        raise InputError(f"{output / name}: a folder where a file must go; nothing was written")
    for folder in name.parents:
        if (output / folder).exists() and not (output / folder).is_dir():
            raise InputError(f"{output / folder}: a file where a folder must go; nothing was written")


def copy_project(paths: Sequence[Path], target: Path, results: Sequence[Result], skip: Path | None = None) -> None:
    """Converted files, and copies of all others, without the folder ``skip``."""
    for path in paths:
        folder = target if len(paths) == 1 or path.is_file() else target / path.resolve().name
        for item, data in _contents(path, results, skip):
            write_file(folder / item.relative_to(path.parent if path.is_file() else path), data, mode_of=item)


def written_place(paths: Sequence[Path], output: Path, file: Path) -> Path:
    """Where ``write_tree`` puts a file."""
    for path in paths:
        if path == file:
            return output / file.name
        if path in file.parents:
            return (output if len(paths) == 1 else output / path.resolve().name) / file.relative_to(path)
    return file


def _contents(path: Path, results: Sequence[Result], skip: Path | None) -> Iterator[tuple[Path, bytes]]:
    converted = {result.path: result for result in results}
    for item in [path] if path.is_file() else walk(path, (), skip, everything=True):
        found = converted.get(item)
        yield item, item.read_bytes() if found is None or found.error else found.after
