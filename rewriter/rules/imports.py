"""Imports that new code needs."""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.changes import Import


def imports(file: File, *modules: str) -> Iterator[Import]:
    """An import of each module that the file has not imported at its top."""
    for module in modules:
        if module not in file.names.module.bindings:
            yield Import(f"import {module}")
