"""Where classes make parameters of their own."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk


def parameter_calls(file: File, classes: Classes) -> Iterator[ast.Call]:
    """Calls of ``nn.Parameter`` in the methods, but ``forward``, of classes that are or become DistributedModules."""
    if b"Parameter" not in file.source.data:
        return
    for info in classes.all(file):
        if classes.kind(info) not in {"module", "distributed"}:
            continue
        for method in info.methods.values():
            if method.name == "forward":
                continue
            for node in walk(method):
                if isinstance(node, ast.Call) and classes.project.external(file, node.func) == "torch.nn.Parameter":
                    yield node
