"""Loops over containers: what they call, and what is carried from call to call."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rewriter.analyze.model.flow import carried, names
from rewriter.analyze.read.file import ClassInfo, File
from rewriter.analyze.read.nodes import Function, dotted, self_path, walk

SETUP = re.compile(
    r"^_?(?:init|reset|set_|get_|freeze|unfreeze|enable|disable|load|save|prune|no_|group_|tie|post_init|add_adapter|to$|train$|eval$|"
    r"(?:named_)?(?:parameters|modules|children)$|state_dict$|requires_grad_$|apply$|register_|half$|float$|cuda$|cpu$)"
)

Header = Literal["plain", "enumerate", "range", "zip", "slice", "reversed", "values", "pairs", "other"]


@dataclass(frozen=True, eq=False)
class Loop:
    """A ``for`` over ``self.<path>`` (or an index range of it) in a method of ``owner``."""

    file: File
    owner: ClassInfo
    function: Function
    node: ast.For
    path: str
    container: ast.expr
    header: Header
    element: str
    index: str
    me: str

    def is_element(self, node: ast.AST) -> bool:
        """Whether an expression is the loop's current member, or its ``__call__`` or ``forward``."""
        if isinstance(node, ast.Attribute) and node.attr in {"__call__", "forward"}:
            node = node.value
        if isinstance(node, ast.Name):
            return bool(self.element) and node.id == self.element
        if isinstance(node, ast.Subscript) and self.index:
            return self_path(node.value, self.me) == self.path and dotted(node.slice) == self.index
        return False

    def calls(self) -> Iterator[ast.Call]:
        """Calls of the member itself, also by ``checkpoint(member, x)`` and ``checkpoint(lambda m: ..., member)``."""
        for statement in self.node.body:
            for node in walk(statement):
                if isinstance(node, ast.Call):
                    first = 1 if node.args and isinstance(node.args[0], ast.Lambda) else 0
                    if self.is_element(node.func) or any(map(self.is_element, node.args[first : first + 1])):
                        yield node

    @cached_property
    def carried(self) -> set[str]:
        """Names by which something goes from one member to the next."""
        return carried(self.node)


class Loops(dict[ClassInfo, list[Loop]]):
    """The loops of classes, found when first asked for."""

    def __missing__(self, info: ClassInfo) -> list[Loop]:
        self[info] = list(find_loops(info))
        return self[info]


def find_loops(info: ClassInfo) -> Iterator[Loop]:
    """Every ``for`` over an own container in the methods of a class."""
    for function in info.methods.values():
        arguments = [*function.args.posonlyargs, *function.args.args]
        me = arguments[0].arg if arguments else ""
        if not me or any(dotted(item) in {"staticmethod", "classmethod"} for item in function.decorator_list):
            continue
        nodes = list(walk(function))
        loops = [node for node in nodes if isinstance(node, ast.For)]
        if loops:
            aliases = _aliases(nodes, me)
            foreign = {item for node in nodes if node is not function and _has_own(node, me) for item in walk(node)}
            for node in loops:
                if node not in foreign:
                    yield from _loops(info, function, node, me, aliases)


def _has_own(node: ast.AST, me: str) -> bool:
    """Whether a function within a method has an argument by the name of the method's ``self``."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return False
    return any(isinstance(item, ast.arg) and item.arg == me for item in walk(node.args))


Aliases = dict[str, tuple[str, bool]]


def _aliases(nodes: list[ast.AST], me: str) -> Aliases:
    """Local names that stand for one container, ``layers = self.layers``, and whether perhaps for a slice of it.

    A name of a slice itself, ``part = slice(0, 2)``, has no path.
    """
    given = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored: dict[str, int] = {}
    values: dict[str, list[tuple[str | None, bool]]] = {}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored[node.id] = stored.get(node.id, 0) + 1
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            for value in (node.value.body, node.value.orelse) if isinstance(node.value, ast.IfExp) else (node.value,):
                values.setdefault(node.targets[0].id, []).append(_aliased(value, me))
    found: Aliases = {}
    for name, places in values.items():
        paths = {path for path, _ in places if path is not None}
        if len(paths) == 1 and stored[name] <= len(places) and name not in given:
            path, sliced = paths.pop(), any(sliced for _, sliced in places)
            if path or sliced:
                found[name] = path, sliced
    return found


def _aliased(value: ast.expr, me: str) -> tuple[str | None, bool]:
    """The path that a value stands for, None for no members at all, and whether for a slice of it."""
    if isinstance(value, (ast.List, ast.Tuple)) and not value.elts:
        return None, True
    if isinstance(value, ast.Call):
        return "", dotted(value.func) == "slice"
    sliced = isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice)
    path = self_path(value.value if isinstance(value, ast.Subscript) and sliced else value, me)
    return path, sliced and bool(path)


def _loops(info: ClassInfo, function: Function, node: ast.For, me: str, aliases: Aliases) -> Iterator[Loop]:
    """One loop for each container that a ``for`` runs over: several with zip, or an index into parallel lists."""
    paths = set()
    for header, container, element, index in (*_headers(node, me, aliases), *_indexed(node, me)):
        path = self_path(container, me)
        if not path and isinstance(container, ast.Name) and container.id in aliases:
            path, sliced = aliases[container.id]
            header = "slice" if sliced and header in {"plain", "enumerate"} else header
        if path and path not in paths:
            paths.add(path)
            yield Loop(info.file, info, function, node, path, container, header, element, index, me)


Found = tuple[Header, ast.expr, str, str]


def _headers(node: ast.For, me: str, aliases: Aliases) -> Iterator[Found]:
    """Kind of iteration, the container iterated over, names of the member and of the index."""
    source, target = node.iter, node.target
    if isinstance(source, ast.Call):
        function = (dotted(source.func) or "").split(".")[-1]
        if function == "enumerate" and source.args and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            inner = ast.For(target=target.elts[1], iter=source.args[0], body=node.body, orelse=[])
            for header, container, element, _ in _headers(inner, me, aliases):
                yield "enumerate" if header == "plain" else header, container, element, _id(target.elts[0])
        elif function in {"zip", "zip_longest"} and isinstance(target, (ast.Tuple, ast.List)):
            for item, part in zip(source.args, target.elts, strict=False):
                inner = ast.For(target=part, iter=item, body=node.body, orelse=[])
                for header, container, element, _ in _headers(inner, me, aliases):
                    yield "pairs" if header == "pairs" else "zip", container, element, ""
        elif function == "reversed" and len(source.args) == 1:
            yield "reversed", source.args[0], _id(target), ""
        elif isinstance(source.func, ast.Attribute) and not source.args and not source.keywords:
            if function in {"values", "children"}:
                yield "values", source.func.value, _id(target), ""
            elif function == "items" and isinstance(target, ast.Tuple):
                yield "values", source.func.value, _id(target.elts[-1]), ""
    elif isinstance(source, ast.Subscript) and (
        isinstance(source.slice, ast.Slice) or aliases.get(dotted(source.slice) or "") == ("", True)
    ):
        yield "slice" if isinstance(target, ast.Name) else "pairs", source.value, _id(target), ""
    elif self_path(source, me) or (isinstance(source, ast.Name) and source.id in aliases):
        yield "plain" if isinstance(target, ast.Name) else "pairs", source, _id(target), ""


def _indexed(node: ast.For, me: str) -> Iterator[Found]:
    """``for i in range(...)``, or in anything, whose body uses ``self.<path>[i]``, perhaps under a name of its own."""
    plain = isinstance(node.iter, ast.Call) and dotted(node.iter.func) == "range"
    inside = [item for statement in node.body for item in walk(statement)]
    for index in dict.fromkeys(name.id for name in names(node.target)):
        found: dict[str, tuple[ast.expr, str]] = {}
        for item in inside:
            if isinstance(item, ast.Subscript) and dotted(item.slice) == index and self_path(item.value, me):
                found.setdefault(self_path(item.value, me), (item.value, ""))
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
            if isinstance(statement, ast.Assign) and isinstance(value, ast.Subscript) and dotted(value.slice) == index:
                path = self_path(value.value, me)
                if path in found:
                    found[path] = found[path][0], _id(statement.targets[0])
        for container, name in found.values():
            yield "range" if plain else "other", container, name, index


def _id(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def stored_names(nodes: list[ast.stmt]) -> set[str]:
    """Names that statements bind or delete, their own function's only."""
    return {
        node.id
        for statement in nodes
        for node in walk(statement)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }


def is_chain(loop: Loop) -> bool:
    """Whether what an iteration leaves goes into a member's call in the next one."""
    if loop.header == "pairs":
        return False
    for call in loop.calls():
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        given = {name.id for argument in arguments for name in names(argument)}
        if (given & loop.carried) - {loop.element, loop.index}:
            return True
    return False


def is_pairs(loop: Loop) -> bool:
    return loop.header == "pairs"


def takes_apart(loop: Loop) -> bool:
    """Whether members are unpacked, indexed or iterated over, ``for attn, ff in ...`` or ``level["up"](x)``: groups."""
    if is_pairs(loop):
        return any(isinstance(node, ast.Call) for statement in loop.node.body for node in walk(statement))
    for node in (node for statement in loop.node.body for node in walk(statement)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and loop.is_element(node.value):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and loop.is_element(node.func.value):
            return True
        if isinstance(node, ast.For) and any(map(loop.is_element, iterated(node))):
            return True
    return False


def runs_parts(loop: Loop) -> bool:
    """Whether parts of the members are called or iterated over, ``level.up(x)`` or ``for part in level.parts``."""
    for node in (node for statement in loop.node.body for node in walk(statement)):
        if isinstance(node, ast.Call) and _is_part(loop, node.func):
            return True
        if isinstance(node, (ast.For, ast.comprehension)) and any(_is_part(loop, value) for value in iterated(node)):
            return True
    return False


def iterated(node: ast.For | ast.comprehension) -> list[ast.expr]:
    """What a loop runs over, also by ``enumerate`` and the like."""
    return node.iter.args if isinstance(node.iter, ast.Call) else [node.iter]


def _is_part(loop: Loop, node: ast.AST) -> bool:
    """Whether an expression is a part of the member, and no method that only sets it up."""
    if not isinstance(node, (ast.Attribute, ast.Subscript)):
        return False
    if isinstance(node, ast.Attribute) and SETUP.match(node.attr):
        return False
    return loop.is_element(node.value) or _is_part(loop, node.value)
