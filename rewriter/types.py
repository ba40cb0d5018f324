"""Values shared by every layer: findings and results. All frozen."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from rewriter.changes import Change

Cells = tuple[tuple[int, int], ...]
"""Of a notebook: the line before each cell's code in the text of all, and the cell's number, from 1."""


def place(cells: Cells, line: int) -> str:
    """A line of a file, in words: ``cell 2:3`` in a notebook."""
    within = [(line - before, number) for before, number in cells if before < line]
    return f"cell {within[-1][1]}:{within[-1][0]}" if within else str(line)


class InputError(Exception):
    """Input that cannot be converted; the message is one line for the user."""


class ConflictError(Exception):
    """Changes that cannot be made together, or of code that cannot be found. Always a bug in a rule."""


def failure(what: str, path: Path, error: Exception) -> InputError:
    """A fault of the converter's own as one line: what failed at which file, how, and what the user can do."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    raised = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(
        f"{path}: {what} failed ({raised}{where}); please report this. Nothing was converted, because files change "
        f"together; --exclude {path.name} leaves this one out"
    )


@dataclass(frozen=True, slots=True)
class Conversion:
    """Changes that belong together.

    ``requires`` names ``key``s of other conversions without which these changes would be wrong. An ``unsafe`` one is
    made only if the user asks for it.
    """

    code: str
    line: int
    message: str
    changes: tuple[Change, ...]
    unsafe: bool = False
    key: str = ""
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that the user should know, about code that stays as it is.

    ``differs`` says that on several ranks something comes out otherwise than on one until the user sees to it. An
    ``unsafe`` one is about an edit that the user has to ask for.
    """

    code: str
    line: int
    message: str
    differs: bool = False
    unsafe: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """The file must not be changed.

    With ``spared`` only rules with these codes may change it, and not between ``line`` and ``end``.
    """

    code: str
    line: int
    message: str
    spared: tuple[str, ...] = ()
    end: int = 0


Finding = Conversion | Remark | Refusal


@dataclass(frozen=True, slots=True)
class Tried:
    """What running original and converted code side by side has shown.

    ``rows`` are those of a table, its head first; ``notes`` are lines beside it.
    """

    title: str
    held: bool
    verdict: str
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one file. ``error`` is one line; then ``after`` equals ``before``.

    ``lists`` are the names of its lists of modules, if the user named any; ``cells`` those of a notebook.
    """

    path: Path
    before: bytes
    after: bytes
    applied: tuple[Conversion, ...] = ()
    hidden: tuple[Conversion, ...] = ()
    reported: tuple[Remark | Refusal, ...] = ()
    error: str = ""
    lists: tuple[str, ...] = ()
    cells: Cells = ()

    @property
    def changed(self) -> bool:
        return self.before != self.after

    def at(self, line: int) -> str:
        """A line as it is named to the user: ``file.py:3`` or, in a notebook, ``nb.ipynb:cell 2:3``."""
        return f"{self.path}:{place(self.cells, line)}"
