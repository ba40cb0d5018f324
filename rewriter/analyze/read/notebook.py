"""Notebooks: the code cells of an ``.ipynb`` file as one piece of Python, and back."""

from __future__ import annotations

import json
import re
from typing import Any

from rewriter.types import Cells, InputError

_MARK = "# bmt-convert cell {} ---\n"
_MARKS = re.compile(r"^# bmt-convert cell (\d+) ---\n", re.M)
_MAGIC = re.compile(r"^(\s*)([%!?].*|.*\?)$")
_HIDDEN = re.compile(r"^(\s*)pass  # bmt-convert magic (.*)$")


class Notebook:
    """Cells as text. Cells with a ``%%`` magic, which may hold anything, are left out.

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
            number: "".join(cell.get("source", []))
            for number, cell in enumerate(cells)
            if cell.get("cell_type") == "code" and not "".join(cell.get("source", [])).lstrip().startswith("%%")
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
            lines = [_MAGIC.sub(r"\1pass  # bmt-convert magic \2", line) for line in source.split("\n")]
            parts.append(_MARK.format(number) + "\n".join(lines) + "\n")
        return "".join(parts)

    def with_text(self, text: str) -> bytes:
        """The notebook's bytes with the cells of a converted module."""
        pieces = _MARKS.split(text)
        changed = False
        for number, body in zip(pieces[1::2], pieces[2::2], strict=True):
            lines = [_HIDDEN.sub(r"\1\2", line) for line in body.removesuffix("\n").split("\n")]
            source = "\n".join(lines)
            if source != self.cells[int(number)]:
                changed = True
                self.content["cells"][int(number)]["source"] = source.splitlines(keepends=True)
        if not changed:
            return self.raw
        indent = re.search(rb"\n( +)", self.raw)
        end = "\n" if self.raw.endswith(b"\n") else ""
        spaces = len(indent[1]) if indent else None
        return (json.dumps(self.content, indent=spaces, ensure_ascii=False) + end).encode()
