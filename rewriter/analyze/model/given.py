"""Which arguments of blocks no share may meet: what their owner makes of parameters, or for all heads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.model.attributes import Attributes, is_count
from rewriter.analyze.model.flow import assignments
from rewriter.analyze.model.loops import Loop
from rewriter.analyze.model.stack import Stack
from rewriter.analyze.model.tensors import Chain, Linear, Object, Simple, Tensor, Value
from rewriter.analyze.read.file import ClassInfo
from rewriter.analyze.read.nodes import Function, positional, self_path, walk

_FACTS = {"shape", "size", "device", "dtype", "dim", "ndim"}


def trained(attributes: Attributes, stack: Stack, function: Function) -> set[str]:
    """The arguments of ``function``, the forward of a stack's blocks, that are made of parameters or for all heads."""
    names = positional(function)[1:]
    found: set[str] = set()
    for loop in stack.loops:
        for call in loop.calls() if loop.owner is stack.owner else ():
            values = call.args if loop.is_element(call.func) else call.args[1:]
            given = [*zip(names, values, strict=False)]
            given += [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg]
            found |= {name for name, value in given if _trains(attributes, loop, value, set())}
    return found


def _trains(attributes: Attributes, loop: Loop, node: ast.AST, seen: set[str]) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in _FACTS:
        return False
    word = getattr(node, "id", getattr(node, "attr", ""))
    if isinstance(word, str) and is_count(word) and "mask" not in word:
        return True
    path = self_path(node, loop.me) if isinstance(node, ast.expr) else ""
    if path:
        return _holds_parameters(attributes, attributes.value(Object(loop.owner, ""), path), set())
    if isinstance(node, ast.Call) and (path := self_path(node.func, loop.me)):
        made = attributes.value(Object(loop.owner, ""), path)
        if isinstance(made, Object) and not _holds_parameters(attributes, made, set()):
            return False  # a table of angles, which takes what it is given for its type
        method = attributes.classes.method(loop.owner, path)
        if method is not None and path not in seen:
            body: list[ast.AST] = [*method[1].body]
            seen = seen | {path}
            return any(_trains(attributes, loop, item, seen) for item in (*body, *node.args, *node.keywords))
    if isinstance(node, ast.Name) and node.id not in seen:
        seen = seen | {node.id}
        return any(_trains(attributes, loop, value, seen) for value in _values(loop.function, node.id))
    return any(_trains(attributes, loop, child, seen) for child in ast.iter_child_nodes(node))


def _values(function: Function, name: str) -> Iterator[ast.AST]:
    """What a local name is given anywhere in a function."""
    for targets, value in assignments(list(walk(function))):
        if any(isinstance(item, ast.Name) and item.id == name for target in targets for item in walk(target)):
            yield value


def _holds_parameters(attributes: Attributes, value: Value, seen: set[ClassInfo]) -> bool:
    match value:
        case Tensor(hidden=hidden):
            return hidden
        case Simple(kind=kind):
            return kind == "norm"
        case Linear() | Chain():
            return True
        case Object(cls=cls) if cls not in seen:
            inside = (attributes.value(value, name) for name in attributes.assigned(cls))
            return any(_holds_parameters(attributes, item, seen | {cls}) for item in inside)
    return False
