"""Batches that a script draws at random, and whether ranks get other data at all."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.scripts import Scripts

_DRAWS = {"torch.randint", "torch.randn", "torch.rand"}
_DEEP = 2
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
        if (_batch_sized(node) or _picks_a_batch(file, scripts, node)) and isinstance(
            parent, (ast.Assign, ast.AnnAssign, ast.Call, ast.Attribute)
        ):
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


def _picks_a_batch(file: File, scripts: Scripts, call: ast.Call) -> bool:
    """Whether ``index = torch.randint(len(data), (12,))`` picks items for a loop that trains, of whatever number.

    Not in a class, which may be a worker's, or under a test, where it may be for something else.
    """
    statement, size = file.names.parents[call], _first_size(call)
    listed = [
        item for item in (*call.args, *(k.value for k in call.keywords)) if isinstance(item, (ast.Tuple, ast.List))
    ]
    if (dotted(call.func) or "").split(".")[-1] != "randint" or len(listed) != 1 or len(listed[0].elts) != 1:
        return False
    several = isinstance(size, ast.Constant) and isinstance(size.value, int) and size.value > 1
    if not (several or isinstance(size, (ast.Name, ast.Attribute))) or file.names.class_of(call) is not None:
        return False
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]):
            function = file.names.function_of(call)
            return _is_index(file, function or file.tree, name) and _is_for_training(file, scripts, call)
    return False


def _is_index(file: File, around: ast.AST, name: str) -> bool:
    """Whether ``data[name]`` is taken, or ``data[i]`` for every ``i`` of it."""
    picked = {name}
    for item in walk(around):
        if isinstance(item, (ast.For, ast.comprehension)) and isinstance(item.target, ast.Name):
            if isinstance(item.iter, ast.Name) and item.iter.id == name:
                picked.add(item.target.id)
    return any(
        isinstance(item, ast.Subscript) and any(isinstance(n, ast.Name) and n.id in picked for n in walk(item.slice))
        for item in walk(around)
    )


def _is_for_training(file: File, scripts: Scripts, node: ast.AST, deep: int = 0) -> bool:
    """Whether a loop that calls backward comes to a node, or to a call of its function, on every pass."""
    for parent in file.names.ancestors(node):
        if isinstance(parent, (ast.If, ast.Lambda)):
            return False
        if isinstance(parent, (ast.For, ast.While)) and any(
            isinstance(item, ast.Attribute) and item.attr == "backward" for item in walk(parent)
        ):
            return True
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            calls = scripts.collectives.instances.calls(file, parent) if deep < _DEEP else ()
            return any(_is_for_training(other, scripts, call, deep + 1) for other, call in calls)
    return False


def _first_size(call: ast.Call) -> ast.expr | None:
    """The first dimension that a call asks for."""
    sizes = [keyword.value for keyword in call.keywords if keyword.arg == "size"]
    sizes += [argument for argument in call.args if isinstance(argument, (ast.Tuple, ast.List))]
    function = (dotted(call.func) or "").split(".")[-1]
    if not sizes and function != "randint" and call.args:
        return call.args[0]
    listed = sizes[0] if sizes else None
    return listed.elts[0] if isinstance(listed, (ast.Tuple, ast.List)) and listed.elts else None
