"""Many checkpoints in a folder: which are whole, how one comes to be, and which go.

A checkpoint is written under a name that begins with a dot, and gets its own when it is complete.  So whatever dies,
a folder ``step-...`` with a ``.metadata`` in it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from ..written import sync_folder
from .storage import METADATA

_PREFIX, _WRITING, _REPLACED, _REMOVING = "step-", ".writing-", ".replaced-", ".removing-"


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, or would be."""
    return folder / f"{_PREFIX}{step:010d}"


def steps(folder: Path) -> list[int]:
    """Of what steps there is a whole checkpoint, newest first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            number = path.name.removeprefix(_PREFIX)
            if path.name.startswith(_PREFIX) and number.isdecimal() and (path / METADATA).is_file():
                found.append(int(number))
    return sorted(found, reverse=True)


def writing_path(folder: Path, step: int, word: str) -> Path:
    """Where one is written; ``word`` is of this attempt alone."""
    return folder / f"{_WRITING}{path_of(folder, step).name}-{word}"


def commit(written: Path, final: Path) -> None:
    """Give a complete checkpoint its name, in place of one that has it."""
    old = final.with_name(_REPLACED + final.name)
    if final.exists():
        _remove(old)
        os.rename(final, old)
    os.rename(written, final)
    sync_folder(final.parent)
    _remove(old)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` whole ones up to ``step``; later ones are of a run that went on from there."""
    for step in [known for known in steps(folder) if known <= step][keep:]:
        path = path_of(folder, step)
        going = path.with_name(_REMOVING + path.name)
        _remove(going)
        os.rename(path, going)  # at once, so that no half of it is taken for whole
        _remove(going)


def sweep(folder: Path) -> None:
    """Remove what writers that died have left, and put back what they were about to replace."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_REPLACED):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if not final.exists():
                os.rename(path, final)
        if path.name.startswith((_WRITING, _REPLACED, _REMOVING)):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
