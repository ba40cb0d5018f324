"""Batches that a script draws at random, and whether ranks get other data at all."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.training.scripts import Scripts

_DRAWS = {"torch.randint", "torch.randn", "torch.rand"}
_BATCH = re.compile(r"^(?:\w*batch(?:_?size)?|bs|bsz|B|n_?batch)$")


def shares_data(file: File, scripts: Scripts) -> bool:
    """Whether ranks get other data, as far as can be seen."""
    if scripts.shares_data(file):
        return True
    return any(True for other in scripts.training for _ in random_batches(other, scripts))


def random_batches(file: File, scripts: Scripts) -> Iterator[ast.Call]:
    """Calls that draw a batch at random, outside of models."""
    project, classes = scripts.project, scripts.classes
    for node in file.calls:
        if project.external(file, node.func) not in _DRAWS:
            continue
        owner = file.names.class_of(node)
        if owner is not None and classes.is_module(file.class_info(owner)):
            continue
        parent = file.names.parents[node]
        if isinstance(parent, ast.Call) and project.external(file, parent.func) == "bmtrain.shard_batch":
            continue
        if _batch_sized(node) and isinstance(parent, (ast.Assign, ast.AnnAssign, ast.Call, ast.Attribute)):
            yield node


def _batch_sized(call: ast.Call) -> bool:
    """Whether the first dimension asked for is a batch size by name."""
    sizes = [keyword.value for keyword in call.keywords if keyword.arg == "size"]
    sizes += [argument for argument in call.args if isinstance(argument, (ast.Tuple, ast.List))]
    function = (dotted(call.func) or "").split(".")[-1]
    if not sizes and function != "randint" and call.args:
        sizes = [ast.Tuple(elts=list(call.args[:1]), ctx=ast.Load())]
    for size in sizes[:1]:
        if isinstance(size, (ast.Tuple, ast.List)) and size.elts:
            return bool(_BATCH.match((dotted(size.elts[0]) or "").split(".")[-1]))
    return False
