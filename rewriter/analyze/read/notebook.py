"""Notebooks: the code cells of an ``.ipynb`` file as one piece of Python, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rewriter.types import Cells, InputError

_MARK = "# bmt-convert cell {} ---\n"
_MARKS = re.compile(r"^# bmt-convert cell (\d+) ---\n", re.M)
_MAGIC = re.compile(r"^(\s*)((?:[!?]|%{1,2}[A-Za-z]|[\w.,()* ]+=\s*(?:!|%[A-Za-z])).*|%{0,2}[\w.*]+\?{1,2}\s*)$")
_HIDDEN = re.compile(r"^(\s*)pass  # bmt-convert magic(?: (.*)|:(.*))$")
_PYTHON = re.compile(r"\s*%%(?:time|capture|prun)\b")


class Notebook:
    """Cells as text. Cells with a ``%%`` magic, which may hold anything, are left out, but for those that run them.

    Raises:
        InputError: the file is no notebook.
    """

    def __init__(self, name: str, raw: bytes) -> None:
        try:
            self.content: dict[str, Any] = json.loads(raw)
            cells = self.content["cells"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{name}:1: not a notebook that can be read") from None
        self.raw = raw
        self.cells = {
            number: source
            for number, cell in enumerate(cells)
            if cell.get("cell_type") == "code"
            and (not (source := "".join(cell.get("source", []))).lstrip().startswith("%%") or _PYTHON.match(source))
        }

    def places(self) -> Cells:
        """Where the cells are in ``text()``."""
        found, line = [], 0
        for number, source in self.cells.items():
            line += 1  # the mark
            found.append((line, number + 1))
            line += source.count("\n") + 1
        return tuple(found)

    def text(self) -> str:
        """The cells as one module; lines with magics become ``pass``."""
        parts = []
        for number, source in self.cells.items():
            parts.append(_MARK.format(number) + "\n".join(_hidden(source.split("\n"))) + "\n")
        return "".join(parts)

    def with_text(self, text: str) -> bytes:
        """The notebook's bytes with the cells of a converted module."""
        pieces = _MARKS.split(text)
        changed = False
        for number, body in zip(pieces[1::2], pieces[2::2], strict=True):
            lines = [_HIDDEN.sub(_shown, line) for line in body.removesuffix("\n").split("\n")]
            source = "\n".join(lines)
            if source != self.cells[int(number)]:
                changed = True
                cell = self.content["cells"][int(number)]
                cell["source"] = source if isinstance(cell["source"], str) else source.splitlines(keepends=True)
        if not changed:
            return self.raw
        indent = re.search(rb"\n( +)", self.raw)
        end = "\n" if self.raw.endswith(b"\n") else ""
        spaces = len(indent[1]) if indent else None
        return (json.dumps(self.content, indent=spaces, ensure_ascii=False) + end).encode()


def _hidden(lines: list[str]) -> Iterator[str]:
    """``lines`` with magics, and what a backslash adds to them, as ``pass``."""
    magic: re.Match[str] | None = None
    for line in lines:
        if magic is not None:
            yield f"{magic[1]}pass  # bmt-convert magic:{line}"
        else:
            magic = _MAGIC.match(line)
            yield line if magic is None else f"{magic[1]}pass  # bmt-convert magic {magic[2]}"
        if not line.endswith("\\"):
            magic = None


def _shown(hidden: re.Match[str]) -> str:
    return f"{hidden[1]}{hidden[2]}" if hidden[3] is None else str(hidden[3])
