"""One word for one thing: units are gathered, prefetched, pinned and released, and nothing is called otherwise."""

from __future__ import annotations

import ast
from pathlib import Path

import bmtrain

OTHER_WORDS = {
    "discard", "drop", "expect", "hand", "hide", "need", "rest", "show", "show_sharded", "show_whole", "take", "unpin",
}  # fmt: skip
"""What gathering, pinning and releasing was called before it was one thing."""
OTHER_FILES = {"access", "assign", "compute", "masters", "on_request", "pins", "residency", "statistics", "turns"}


def test_no_function_is_called_by_another_word() -> None:
    root, found = Path(bmtrain.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        defined = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        found += [f"{path.relative_to(root)}: {node.name}" for node in defined if node.name.strip("_") in OTHER_WORDS]
    assert found == []


def test_no_file_is_called_by_another_word() -> None:
    assert OTHER_FILES.isdisjoint(path.stem for path in Path(bmtrain.__file__).parent.rglob("*.py"))
