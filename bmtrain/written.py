"""Files that appear whole or not at all, whatever dies while they are written."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OF_SEVERAL = re.compile(r"(.+)-\d{5}-of-\d{5}\.\w+")


def sync_folder(path: Path) -> None:
    """Make what was created and renamed in ``path`` outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place when it is complete."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        _sync_file(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def replacing_files_of(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder``, or in it, to write files to, which take their places when all of them are complete.

    A ``folder`` that is new or empty appears whole.  In one that holds files, each takes its place whole, one after the
    other, and files of a series (``model-00001-of-00005.safetensors``) go that are no part of the new one.
    """
    folder = folder.resolve()  # a link stays one
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, where a folder is to be")
    folder.parent.mkdir(parents=True, exist_ok=True)
    within = folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK))
    temporary = Path(tempfile.mkdtemp(dir=folder if within else folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for file in files:
            _sync_file(temporary / file)
        os.chmod(temporary, 0o777 & ~_umask())
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            sync_folder(temporary)
            os.replace(temporary, folder)
        else:
            _move(files, temporary, folder)
        if not within:
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(files: list[Path], temporary: Path, folder: Path) -> None:
    for file in sorted(files, key=lambda file: file.suffix == ".json"):  # an index after what it names
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / file, folder / file)
    for within in {file.parent for file in files}:
        own = [file.name for file in files if file.parent == within]
        series = {match[1].partition("-")[0] for match in map(_OF_SEVERAL.fullmatch, own) if match}
        series |= {name.partition(".")[0] for name in own if not name.endswith(".json")}
        for old in (folder / within).iterdir():
            match = _OF_SEVERAL.fullmatch(old.name)
            if match and match[1] in series and old.name not in own:
                old.unlink()
        sync_folder(folder / within)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
