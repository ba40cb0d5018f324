"""Loops over containers: what they call, what is carried from call to call, and whether one call would do the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rewriter.analyze.checkpoints import collapse_checkpoint
from rewriter.analyze.elements import Function, self_path
from rewriter.analyze.names import dotted, walk
from rewriter.analyze.project import ClassInfo, File, Project

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
        """Whether an expression is the loop's current member."""
        if isinstance(node, ast.Name):
            return bool(self.element) and node.id == self.element
        if isinstance(node, ast.Subscript) and self.index:
            return self_path(node.value, self.me) == self.path and dotted(node.slice) == self.index
        return False

    def calls(self) -> Iterator[ast.Call]:
        """Calls of the member itself, also by ``checkpoint(member, ...)``."""
        for statement in self.node.body:
            for node in walk(statement):
                if isinstance(node, ast.Call):
                    if self.is_element(node.func) or any(self.is_element(argument) for argument in node.args[:1]):
                        yield node


@dataclass(frozen=True)
class CallForm:
    """``targets = container(carried + extras)``: what a loop becomes."""

    targets: tuple[str, ...]
    call: ast.Call
    checkpoint: bool = False


def find_loops(info: ClassInfo) -> Iterator[Loop]:
    """Every ``for`` over an own container in the methods of a class."""
    for function in info.methods.values():
        arguments = [*function.args.posonlyargs, *function.args.args]
        me = arguments[0].arg if arguments else ""
        if not me:
            continue
        aliases = _aliases(function, me)
        for node in walk(function):
            if isinstance(node, ast.For):
                loop = _loop(info, function, node, me, aliases)
                if loop is not None:
                    yield loop


Aliases = dict[str, tuple[str, bool]]


def _aliases(function: Function, me: str) -> Aliases:
    """Local names that stand for one container, ``layers = self.layers``, and whether perhaps for a slice of it."""
    stored: dict[str, int] = {}
    values: dict[str, list[tuple[str, bool]]] = {}
    for node in walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored[node.id] = stored.get(node.id, 0) + 1
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            for value in (node.value.body, node.value.orelse) if isinstance(node.value, ast.IfExp) else (node.value,):
                sliced = isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice)
                path = self_path(value.value if isinstance(value, ast.Subscript) and sliced else value, me)
                values.setdefault(node.targets[0].id, []).append((path, sliced))
    found: Aliases = {}
    for name, places in values.items():
        paths = {path for path, _ in places}
        if len(paths) == 1 and "" not in paths and stored[name] <= len(places):
            found[name] = places[0][0], any(sliced for _, sliced in places)
    return found


def _loop(info: ClassInfo, function: Function, node: ast.For, me: str, aliases: Aliases) -> Loop | None:
    header, container, element, index = _header(node, me, aliases)
    if container is None:
        return None
    path = self_path(container, me)
    if not path and isinstance(container, ast.Name) and container.id in aliases:
        path, sliced = aliases[container.id]
        header = "slice" if sliced and header in {"plain", "enumerate"} else header
    if not path:
        return None
    return Loop(info.file, info, function, node, path, container, header, element, index, me)


def _header(node: ast.For, me: str, aliases: Aliases) -> tuple[Header, ast.expr | None, str, str]:
    """Kind of iteration, the container iterated over, names of the member and of the index."""
    source, target = node.iter, node.target
    if isinstance(source, ast.Call):
        function = dotted(source.func) or ""
        if function == "enumerate" and source.args and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            inner = ast.For(target=target.elts[1], iter=source.args[0], body=[], orelse=[])
            header, container, element, _ = _header(inner, me, aliases)
            return ("enumerate" if header == "plain" else header), container, element, _id(target.elts[0])
        if function == "range" and isinstance(target, ast.Name):
            return _range_header(node, source, target.id, me)
        if function == "zip" and isinstance(target, ast.Tuple):
            for item, name in zip(source.args, target.elts, strict=False):
                if self_path(item, me):
                    return "zip", item, _id(name), ""
            return "other", None, "", ""
        if function == "reversed" and len(source.args) == 1:
            return "reversed", source.args[0], _id(target), ""
        if isinstance(source.func, ast.Attribute) and source.func.attr in {"values", "children"} and not source.args:
            return "values", source.func.value, _id(target), ""
        if isinstance(source.func, ast.Attribute) and source.func.attr == "items" and isinstance(target, ast.Tuple):
            return "values", source.func.value, _id(target.elts[-1]), ""
        return "other", None, "", ""
    if isinstance(source, ast.Subscript) and isinstance(source.slice, ast.Slice):
        return "slice", source.value, _id(target), ""
    if self_path(source, me) or (isinstance(source, ast.Name) and source.id in aliases):
        return ("plain" if isinstance(target, ast.Name) else "pairs"), source, _id(target), ""
    return "other", None, "", ""


def _range_header(node: ast.For, source: ast.Call, index: str, me: str) -> tuple[Header, ast.expr | None, str, str]:
    """``for i in range(...)`` whose body uses ``self.<path>[i]``."""
    for statement in node.body:
        for item in walk(statement):
            if isinstance(item, ast.Subscript) and dotted(item.slice) == index and self_path(item.value, me):
                return "range", item.value, "", index
    return "other", None, "", ""


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
    """Whether something goes into a member's call and comes out of it again."""
    stored = stored_names(loop.node.body)
    if loop.header == "pairs":
        return False
    for call in loop.calls():
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        names = {node.id for argument in arguments for node in walk(argument) if isinstance(node, ast.Name)}
        if (names & stored) - {loop.element, loop.index}:
            return True
    return False


def is_pairs(loop: Loop) -> bool:
    return loop.header == "pairs"


# The call form ------------------------------------------------------------------------------------------------


def call_form(loop: Loop, project: Project) -> CallForm | str:
    """The one call that does what the loop does, or the reason why there is none that provably does."""
    if loop.node.orelse:
        return "the loop has an else branch"
    reason = _header_reason(loop)
    if reason:
        return reason
    if len(loop.node.body) != 1:
        return "the body does more than call the block"
    statement, checkpoint = loop.node.body[0], False
    if isinstance(statement, ast.If):
        collapsed = collapse_checkpoint(loop.file, loop.is_element, statement, project)
        if isinstance(collapsed, str):
            return collapsed
        statement, checkpoint = collapsed, True
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return "the body does not assign the block's result"
    call = statement.value
    if not isinstance(call, ast.Call) or not loop.is_element(call.func):
        return "the body is not a plain call of the block"
    targets = _targets(statement.targets[0])
    if not targets:
        return "the result goes somewhere else than into plain names"
    reason = _argument_reason(loop, call, targets) or _escape_reason(loop)
    return reason or CallForm(targets, call, checkpoint)


def _header_reason(loop: Loop) -> str:
    if loop.header == "plain" or (loop.header == "enumerate" and loop.element):
        return ""
    if loop.header == "range":
        source = loop.node.iter
        assert isinstance(source, ast.Call)
        length = source.args[0] if len(source.args) == 1 else None
        if isinstance(length, ast.Call) and dotted(length.func) == "len" and len(length.args) == 1:
            if self_path(length.args[0], loop.me) == loop.path:
                return ""
        return "the range is not provably the length of the list"
    reasons = {
        "zip": "each block gets arguments of its own (zip)",
        "slice": "only a slice of the list runs",
        "reversed": "the list runs in reverse",
        "values": "the list is iterated through a method",
        "pairs": "the members are pairs, not blocks",
    }
    return reasons.get(loop.header, "the iteration is not a plain one")


def _targets(node: ast.expr) -> tuple[str, ...]:
    names = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    found = tuple(name.id for name in names if isinstance(name, ast.Name))
    distinct = len(set(found)) == len(names) and (len(found) > 1 or isinstance(node, ast.Name))
    return found if distinct else ()


def _argument_reason(loop: Loop, call: ast.Call, targets: tuple[str, ...]) -> str:
    carried = [_id(argument) for argument in call.args[: len(targets)]]
    if tuple(carried) != targets:
        return "what is carried from block to block is not what the first arguments are"
    stored = {*targets, loop.element, loop.index, *stored_names(loop.node.body)}
    for argument in call.args[len(targets) :]:
        value = argument.value if isinstance(argument, ast.Starred) else argument
        if not _invariant(value, stored):
            return "an argument is not the same for every block"
    for keyword in call.keywords:
        if keyword.arg in {"return_hidden_states", "self"}:
            return f"the list has an argument named {keyword.arg} of its own"
        if not _invariant(keyword.value, stored):
            return "an argument is not the same for every block"
    return ""


def _invariant(node: ast.expr, stored: set[str]) -> bool:
    """Whether evaluating an expression once instead of once a block cannot make a difference."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.Name):
        return node.id not in stored
    if isinstance(node, ast.Attribute):
        return _invariant(node.value, stored) and isinstance(node.value, (ast.Name, ast.Attribute))
    if isinstance(node, (ast.Tuple, ast.List)):
        # A fresh list a call could be changed by a block; a tuple cannot.
        return isinstance(node, ast.Tuple) and all(_invariant(item, stored) for item in node.elts)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant) or (
            isinstance(node.op, ast.Not) and _invariant(node.operand, stored)
        )
    return False


def _escape_reason(loop: Loop) -> str:
    """Whether a name of the loop's header is used after it, or in its body otherwise than allowed."""
    own = {name for name in (loop.element, loop.index) if name}
    if any(isinstance(node, (ast.Global, ast.Nonlocal)) and own & set(node.names) for node in walk(loop.function)):
        return "the loop variable outlives the loop"
    inside = set(walk(loop.node))
    rebound = {
        item
        for other in walk(loop.function)
        if isinstance(other, (ast.For, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp))
        and other is not loop.node
        and own <= _bound_by(other)
        for item in walk(other)
    }
    for node in walk(loop.function):
        if isinstance(node, ast.Name) and node.id in own and not isinstance(node.ctx, ast.Store):
            if node not in inside and node not in rebound:
                return "the loop variable is used after the loop"
    uses = sum(1 for s in loop.node.body for n in walk(s) if isinstance(n, ast.Name) and n.id == loop.index)
    allowed = len(list(loop.calls())) if loop.header == "range" else 0
    return "the index is used in the body" if loop.index and uses > allowed else ""


def _bound_by(node: ast.AST) -> set[str]:
    targets = [node.target] if isinstance(node, ast.For) else [g.target for g in getattr(node, "generators", [])]
    return {item.id for target in targets for item in walk(target) if isinstance(item, ast.Name)}
