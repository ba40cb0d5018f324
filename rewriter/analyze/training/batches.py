"""Batches that a script draws at random, and whether ranks get other data at all."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
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
            if not _has_the_size_of_another(file, node):
                yield node


def _has_the_size_of_another(file: File, call: ast.Call) -> bool:
    """Whether the size is read from a tensor, ``batch, length = x.shape``: what is drawn goes with that one's share."""
    size = _first_size(call)
    found = file.names.lookup(size.id, file.names.scope_of(call)) if isinstance(size, ast.Name) else None
    for binding in found[1] if found is not None else ():
        made = file.names.statement_of(binding.node) if isinstance(binding.node, ast.expr) else binding.node
        value = made.value if isinstance(made, (ast.Assign, ast.AnnAssign)) else None
        if value is not None and any(_reads_size(item) for item in walk(value)):
            return True
    return False


def _reads_size(node: ast.AST) -> bool:
    match node:
        case (
            ast.Attribute(attr="shape") | ast.Call(func=ast.Attribute(attr="size")) | ast.Call(func=ast.Name(id="len"))
        ):
            return True
    return False


def _batch_sized(call: ast.Call) -> bool:
    """Whether the first dimension asked for is a batch size by name."""
    size = _first_size(call)
    return size is not None and bool(_BATCH.match((dotted(size) or "").split(".")[-1]))


def _first_size(call: ast.Call) -> ast.expr | None:
    """The first dimension that a call asks for."""
    sizes = [keyword.value for keyword in call.keywords if keyword.arg == "size"]
    sizes += [argument for argument in call.args if isinstance(argument, (ast.Tuple, ast.List))]
    function = (dotted(call.func) or "").split(".")[-1]
    if not sizes and function != "randint" and call.args:
        return call.args[0]
    listed = sizes[0] if sizes else None
    return listed.elts[0] if isinstance(listed, (ast.Tuple, ast.List)) and listed.elts else None
