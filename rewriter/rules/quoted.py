"""Code that takes a place inside a string."""

from __future__ import annotations

import ast

from rewriter.analyze.read.file import File


def quoted(file: File, node: ast.AST, text: str) -> str:
    """Code with double quotes, as it may stand at a node: inside ``f"{...}"`` its own quotes are single."""
    for parent in file.names.ancestors(node):
        if isinstance(parent, ast.JoinedStr):
            code = file.source.code(parent).lstrip("fFrR")
            return text.replace('"', "'") if code.startswith('"') and not code.startswith('"""') else text
        if isinstance(parent, ast.stmt):
            break
    return text
