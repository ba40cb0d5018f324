"""Writes results: files in place, or a whole project to another folder. All of it is written, or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rewriter.convert import sync_folder, write_file
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
    done = f"{len(changed)} file{'s' * (len(changed) != 1)} changed in place"
    staged: dict[Path, Path] = {}
    linked: list[Path] = []
    try:
        for path, result in changed.items():
            if path.read_bytes() != result.before:
                raise InputError(f"{result.path}: changed while it was being converted; nothing was written")
        for number, (path, result) in enumerate(changed.items()):
            if path.stat().st_nlink > 1 or not _may_own(path):
                linked.append(path)
                with path.open("r+b"):  # find out that it may be written before others are
                    pass
            else:
                staged[path] = path.with_name(f".bmt-{os.getpid()}-{number}")
                write_file(staged[path], result.after, like=path, owner=True)
        with uninterrupted(done):
            _write_through(linked, changed)
            for path, new in staged.items():
                os.replace(new, path)
            for folder in {path.parent for path in staged}:
                sync_folder(folder)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; nothing was written") from None
    finally:
        for new in staged.values():
            new.unlink(missing_ok=True)
    return done


def _may_own(path: Path) -> bool:
    """Whether a new file of this process can have the owner and group of ``path``."""
    facts = path.stat()
    return os.geteuid() == 0 or (facts.st_uid == os.geteuid() and facts.st_gid in (os.getegid(), *os.getgroups()))


def _write_through(paths: Sequence[Path], changed: Mapping[Path, Result]) -> None:
    """Change files that must stay what they are: those with several names, or of another owner.

    If one cannot be written, those before it get back what they held.
    """
    done: list[Path] = []
    try:
        for path in paths:
            done.append(path)
            _overwrite(path, changed[path].after)
    except OSError:
        for path in done:
            _overwrite(path, changed[path].before)
        raise


def _overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.write(data)
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())


def check_target(paths: Sequence[Path], output: Path, force: bool) -> None:
    """Raises InputError where a project cannot be written to a folder, or only over what is there."""
    if any(path.resolve() == output.resolve() for path in paths):
        raise InputError(f"{output}: --output must not be the input; use --write to convert in place")
    if output.is_symlink():
        raise InputError(f"{output}: --output is a link; give the folder that it leads to, {os.path.realpath(output)}")
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
            copy_project(paths, stage, results, output.resolve(), links=True)
            files = sorted(path for path in stage.rglob("*") if path.is_symlink() or not path.is_dir())
            names = [path.relative_to(stage) for path in files]
            bare = [path.relative_to(stage) for path in stage.rglob("*") if _is_bare(path)]
            for name in names:
                _check_place(output, name)
            with uninterrupted(done):
                made.clear()
                for name in names:
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(stage / name, output / name)
                for name in bare:
                    (output / name).mkdir(parents=True, exist_ok=True)
                for folder in {(output / name).parent for name in names}:
                    sync_folder(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; {output} is as it was") from None
    finally:
        for folder in made:
            if folder.exists():
                folder.rmdir()
    return done


def _is_bare(path: Path) -> bool:
    """Whether it is a folder with nothing in it."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _check_place(output: Path, name: Path) -> None:
    if (output / name).is_dir() and not (output / name).is_symlink():
        raise InputError(f"{output / name}: a folder where a file must go; nothing was written")
    if (output / name).exists() and not (output / name).is_file() and not (output / name).is_symlink():
        raise InputError(f"{output / name}: a device or FIFO where a file must go; nothing was written")
    for folder in list(name.parents)[:-1]:
        if (output / folder).is_symlink():
            raise InputError(f"{output / folder}: a link where a folder must go; nothing was written")
        if (output / folder).exists() and not (output / folder).is_dir():
            raise InputError(f"{output / folder}: a file where a folder must go; nothing was written")


def copy_project(
    paths: Sequence[Path], target: Path, results: Sequence[Result], skip: Path | None = None, links: bool = False
) -> None:
    """Converted files, and copies of all others, without the folder ``skip``.

    ``links``: what is a link stays one, to the same file if that is outside; else files are copied in their place.
    """
    for path in paths:
        folder = target if len(paths) == 1 or path.is_file() else target / path.resolve().name
        for item, data in _contents(path, results, skip, links):
            place = folder / item.relative_to(path.parent if path.is_file() else path)
            if item.is_dir() and not item.is_symlink():
                place.mkdir(parents=True, exist_ok=True)
            elif data is None:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(_where_to(item, path))
            else:
                write_file(place, data, like=item)


def _where_to(link: Path, root: Path) -> str:
    """What a copy of a link must say."""
    said, top, end = os.readlink(link), Path(os.path.realpath(root)), Path(os.path.realpath(link))
    if end != top and top not in end.parents:
        return str(end)
    return os.path.relpath(end, os.path.realpath(link.parent)) if os.path.isabs(said) else said


def written_place(paths: Sequence[Path], output: Path, file: Path) -> Path:
    """Where ``write_tree`` puts a file."""
    for path in paths:
        if path == file:
            return output / file.name
        if path in file.parents:
            return (output if len(paths) == 1 else output / path.resolve().name) / file.relative_to(path)
    return file


def _contents(
    path: Path, results: Sequence[Result], skip: Path | None, links: bool
) -> Iterator[tuple[Path, bytes | None]]:
    """Every file and what is to be in it; None for a link that stays one, and for a folder with nothing in it."""
    converted = {result.path: result for result in results}
    for item in [path] if path.is_file() else walk(path, (), skip, everything=True):
        found = converted.get(item)
        if item is not path and item.is_symlink() and (links or not item.is_file()):
            if links:
                yield item, None
        elif item.is_dir():
            yield item, None
        else:
            yield item, item.read_bytes() if found is None or found.error else found.after
