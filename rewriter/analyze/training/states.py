"""Loops that write to the tensors of a state dict, as averages of a model do."""

from __future__ import annotations

import ast

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk, walk_own


def written_states(file: File, node: ast.For) -> list[ast.Call]:
    """The calls of ``state_dict()`` of a loop such as ``for name, value in m.state_dict().items(): value.mul_(0.9)``.

    The first is of the model that is written, the others of those that the loop reads: ``other[name]``, where it was
    made by ``other = model.state_dict()``. Empty if nothing is written.
    """
    calls = [item for item in walk(node.iter) if isinstance(item, ast.Call) and _is_state(item)]
    names = {item.id for item in walk(node.target) if isinstance(item, ast.Name)}
    body = [item for statement in node.body for item in walk_own(statement)]
    if not calls or not any(_writes_to(item, names) for item in body):
        return []
    used = {item.value.id for item in body if isinstance(item, ast.Subscript) and isinstance(item.value, ast.Name)}
    for item in walk(file.names.function_of(node) or file.tree):
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Call) and _is_state(item.value):
            calls += [item.value] if dotted(item.targets[0]) in used else []
    return calls


def _is_state(node: ast.Call) -> bool:
    """Whether a call is ``model.state_dict()``."""
    match node:
        case ast.Call(func=ast.Attribute(value=owner, attr="state_dict"), args=[], keywords=[]):
            return dotted(owner) is not None
    return False


def _writes_to(node: ast.AST, names: set[str]) -> bool:
    """Whether a node changes a tensor of one of these names in place."""
    match node:
        case ast.AugAssign(target=ast.Name(id=name)):
            return name in names
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name) | ast.Attribute(value=ast.Name(id=name)), attr=attr)):
            return name in names and attr.endswith("_") and not attr.startswith("_")
    return False
