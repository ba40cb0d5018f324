"""What an iteration of a loop gets from the one before."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.nodes import walk

_GROWING = {"append", "appendleft", "extend", "insert", "update", "add"}
_JUMPS = (ast.Continue, ast.Break, ast.Return, ast.Raise)
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)


def carried(loop: ast.For) -> set[str]:
    """Names whose value goes from one iteration into the next, and all that an iteration makes of them."""
    own = {name.id for name in names(loop.target)}
    flows = list(_flows(loop.body))
    reads = _Reads()
    reads.block(loop.body, own)
    found = (reads.early & reads.stored) | _kept_by_containers(loop.body, _made_of(own, flows))
    return _made_of(found, flows)


def _made_of(found: set[str], flows: list[tuple[set[str], set[str]]]) -> set[str]:
    """Names, and those that assignments give something made of them."""
    while True:
        more = {target for targets, sources in flows if sources & found for target in targets} - found
        if not more:
            return found
        found = found | more


def certain_names(function: ast.FunctionDef | ast.AsyncFunctionDef, loop: ast.For) -> set[str]:
    """Names that surely have a value where a loop of a function begins, or that are not the function's own."""
    given = {node.arg for node in walk(function.args) if isinstance(node, ast.arg)}
    reads = _Reads(loop)
    reads.block(function.body, given)
    every = {node.id for node in walk(function) if isinstance(node, ast.Name)}
    return every if reads.before is None else (every - reads.stored) | reads.before


def names(node: ast.AST) -> Iterator[ast.Name]:
    """Names in a node, but those that comprehensions and lambdas in it have of their own."""
    own: set[str] = set()
    if isinstance(node, _SCOPES):
        parts = [generator.target for generator in getattr(node, "generators", [])]
        own = {item.id for part in parts for item in walk(part) if isinstance(item, ast.Name)}
        own |= {item.arg for item in walk(node) if isinstance(item, ast.arg)}
    if isinstance(node, ast.Name):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from (name for name in names(child) if name.id not in own)


class _Reads:
    """``early``: names that are read before they are given a value; ``stored``: names that are given one.

    ``before``: those that have one where the loop ``watched`` begins.
    """

    def __init__(self, watched: ast.For | None = None) -> None:
        self.early: set[str] = set()
        self.stored: set[str] = set()
        self.watched = watched
        self.before: set[str] | None = None

    def block(self, body: list[ast.stmt], defined: set[str]) -> set[str]:
        """The names that surely have a value of this iteration after some statements."""
        for statement in body:
            defined = self._statement(statement, defined)
        return defined

    def _statement(self, node: ast.stmt, defined: set[str]) -> set[str]:
        if isinstance(node, ast.If):
            self._simple(node.test, defined)
            sides = [(side, self.block(side, set(defined))) for side in (node.body, node.orelse)]
            going_on = [after for side, after in sides if not (side and isinstance(side[-1], _JUMPS))]
            return set.intersection(*going_on) if going_on else defined
        if isinstance(node, (ast.For, ast.AsyncFor)):
            self._simple(node.iter, defined)
            if node is self.watched:
                self.before = set(defined)
            inside = self._simple(node.target, set(defined))
            self.block(node.orelse, self.block(node.body, inside) & defined)
        elif isinstance(node, ast.While):
            self._simple(node.test, defined)
            self.block([*node.body, *node.orelse], set(defined))
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                defined = self._simple(item, defined)
            return self.block(node.body, defined)
        elif isinstance(node, ast.Try):
            after = self.block([*node.body, *node.orelse], set(defined))
            for handler in node.handlers:
                self.block(handler.body, set(defined))
            return self.block(node.finalbody, after if not node.handlers else after & defined)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found = list(names(node))
            own = {name.id for name in found if not isinstance(name.ctx, ast.Load)}
            self.early |= {name.id for name in found} - own - defined
        else:
            return self._simple(node, defined)
        return defined

    def _simple(self, node: ast.AST, defined: set[str]) -> set[str]:
        found = list(names(node))
        reads = {name.id for name in found if isinstance(name.ctx, ast.Load)}
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            reads.add(node.target.id)
        written = {name.id for name in found if not isinstance(name.ctx, ast.Load)}
        self.early |= reads - defined
        self.stored |= written
        return defined | written


def _kept_by_containers(body: list[ast.stmt], changing: set[str]) -> set[str]:
    """Lists and dicts that the body fills and reads, but not only at the place that this iteration fills."""
    nodes = [node for statement in body for node in walk(statement)]
    filled: dict[str, set[str]] = {}
    ignored: set[ast.AST] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _GROWING:
            if isinstance(node.func.value, ast.Name):
                filled.setdefault(node.func.value.id, set())
                ignored.add(node.func.value)
    grown = set(filled)
    places = [node for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)]
    for node in places:
        if not isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name):
            filled.setdefault(node.value.id, set()).add(ast.dump(node.slice))
            ignored.add(node.value)
    for node in places:
        if isinstance(node.value, ast.Name) and node.value.id not in grown:
            if changing & {name.id for name in names(node.slice)} and ast.dump(node.slice) in filled.get(
                node.value.id, ()
            ):
                ignored.add(node.value)
    return filled.keys() & {name.id for statement in body for name in names(statement) if name not in ignored}


def _flows(body: list[ast.stmt]) -> Iterator[tuple[set[str], set[str]]]:
    """(names that get a value, names that it is made of) of each assignment."""
    for targets, value in assignments([node for statement in body for node in walk(statement)]):
        yield {name.id for target in targets for name in _given(target)}, {name.id for name in names(value)}


def assignments(nodes: list[ast.AST]) -> Iterator[tuple[list[ast.expr], ast.AST]]:
    """The targets of each assignment, and what they are made of."""
    for node in nodes:
        targets: list[ast.expr] = []
        value: ast.AST | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
            targets, value = [node.target], node.value
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            targets, value = [node.target], node.iter
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            targets, value = [node.optional_vars], node.context_expr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _GROWING:
            if isinstance(node.func.value, ast.Name):
                targets, value = [node.func.value], node
        if value is not None:
            yield targets, value


def _given(target: ast.expr) -> Iterator[ast.Name]:
    """The names that get something by an assignment, also in part: ``a`` and ``b`` of ``a, b[0] = ...``."""
    if isinstance(target, (ast.Tuple, ast.List)):
        for item in target.elts:
            yield from _given(item)
    elif isinstance(target, (ast.Starred, ast.Subscript)):
        yield from _given(target.value)
    elif isinstance(target, ast.Name):
        yield target
