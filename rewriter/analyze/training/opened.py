"""Rank guards that every rank is to enter for what they give names to, which code of all ranks reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.training.collectives import Guard, guards
from rewriter.analyze.training.writers import opens_for_writing

_LEAVES = (ast.Return, ast.Continue, ast.Break, ast.Raise)
_ALL_RANKS = {"print", "save"}
"""Calls, as statements of their own, whose arguments all ranks compute when the guard around them goes."""


def with_givers(file: File, opened: dict[ast.If, Guard]) -> dict[ast.If, Guard]:
    """``opened``, and the guards without which other ranks would lack what is read in these.

    ``if rank == 0: log = open(path, "w")``, and then ``if rank == 0: print(evaluate(model), file=log)``.
    """
    every = {guard.node: guard for guard in guards(file) if not guard.either} if opened else {}
    while len(every) > len(opened):
        kept = {node: guard for node, guard in every.items() if node not in opened}
        found = {node: kept[node] for guard in opened for node in _givers(file, guard, kept)}
        if not found:
            break
        opened = {**opened, **found}
    return opened


def told_by_one(file: File, opened: dict[ast.If, Guard]) -> Iterator[tuple[Guard, ast.Name | ast.Attribute, ast.AST]]:
    """The guards that stay, a name that such a one alone gives a value to, and a place where an opened one reads it."""
    kept = {guard.node: guard for guard in guards(file) if not guard.either and guard.node not in opened}
    seen = set[tuple[ast.If, str]]()
    for guard in opened if kept else ():
        for node, givers in _unknown_to_others(file, guard, kept):
            for giver in givers:
                if (giver, ast.unparse(node)) not in seen:
                    seen.add((giver, ast.unparse(node)))
                    yield kept[giver], node, guard


def _givers(file: File, opened: ast.If, kept: dict[ast.If, Guard]) -> Iterator[ast.If]:
    """The guards that alone give values to what an opened one reads."""
    for _, givers in _unknown_to_others(file, opened, kept):
        yield from (guard for guard in givers if goes_on(guard))


def _unknown_to_others(
    file: File, opened: ast.If, kept: dict[ast.If, Guard]
) -> Iterator[tuple[ast.Name | ast.Attribute, list[ast.If]]]:
    """What an opened guard reads that guards in ``kept`` alone give values to, with these."""
    for statement in opened.body:
        for node in _read_by_all(statement):
            bindings = _bindings(file, node)
            inside = [binding for binding in bindings if opened in file.names.ancestors(binding)]
            if any(_comes_first(file, opened, binding, node) for binding in inside):
                continue
            within = [_kept_around(file, binding, kept) for binding in bindings if binding not in inside]
            givers = [guard for guard in within if guard is not None]
            if givers and len(givers) == len(within):
                yield node, givers


def _read_by_all(statement: ast.stmt) -> Iterator[ast.Name | ast.Attribute]:
    """The names that a statement reads where its guard goes: not those of calls that are left to one rank."""
    match statement:
        case ast.If(test=test, body=body, orelse=orelse):
            yield from _loads(test)
            for inner in (*body, *orelse):
                yield from _read_by_all(inner)
        case ast.For(iter=iterated, body=body, orelse=orelse) | ast.While(test=iterated, body=body, orelse=orelse):
            yield from _loads(iterated)
            for inner in (*body, *orelse):
                yield from _read_by_all(inner)
        case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))):
            yield from _loads(statement) if name in _ALL_RANKS else ()
        case ast.With(items=items, body=body):
            if not any(opens_for_writing(item.context_expr) for item in items):
                for item in items:
                    yield from _loads(item.context_expr)
                for inner in body:
                    yield from _read_by_all(inner)
        case _:
            yield from _loads(statement)


def _loads(node: ast.AST) -> Iterator[ast.Name | ast.Attribute]:
    for item in walk(node):
        match item:
            case ast.Name(ctx=ast.Load()) | ast.Attribute(value=ast.Name(id="self"), ctx=ast.Load()):
                yield item
            case ast.AugAssign(target=ast.Name() | ast.Attribute(value=ast.Name(id="self")) as target):
                yield target


def _bindings(file: File, node: ast.Name | ast.Attribute) -> list[ast.AST]:
    """Where a name, or an attribute of ``self``, gets its values."""
    if isinstance(node, ast.Name):
        found = file.names.lookup(node.id, file.names.scope_of(node))
        return [binding.node for binding in found[1]] if found is not None else []
    owner = file.names.class_of(node)
    return [
        item
        for item in (walk(owner) if owner is not None else ())
        if isinstance(item, ast.Attribute)
        and item.attr == node.attr
        and isinstance(item.ctx, ast.Store)
        and isinstance(item.value, ast.Name)
        and item.value.id == "self"
    ]


def _comes_first(file: File, guard: ast.If, binding: ast.AST, read: ast.AST) -> bool:
    """Whether a name has got a value in its guard before it is read there."""
    statement = file.names.statement_of(binding)
    return (
        any(statement is item for item in guard.body)
        and statement not in file.names.ancestors(read)
        and (statement.lineno < getattr(read, "lineno", 0))
    )


def _kept_around(file: File, node: ast.AST, kept: dict[ast.If, Guard]) -> ast.If | None:
    """The guard in whose body a node stands, where one rank alone comes to it."""
    child = node
    for parent in file.names.ancestors(node):
        if isinstance(parent, ast.If) and parent in kept and any(child is item for item in parent.body):
            return parent
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and child is not node:
            return None
        child = parent
    return None


def goes_on(guard: ast.If) -> bool:
    """Whether a guard can be opened: it has one side, and does not leave the code around it."""
    return not guard.orelse and not any(isinstance(node, _LEAVES) for item in guard.body for node in walk(item))
