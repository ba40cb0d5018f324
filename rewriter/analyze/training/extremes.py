"""What a script keeps of its losses as tensors by comparing or mixing them: ``best = min(best, loss)``, ``torch.lerp``.

The least of the ranks' losses is not that of their means, so losses are averaged before any is compared.
"""

from __future__ import annotations

import ast

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import OF_TWO, assigned_by, dotted, is_backward, read_out, walk, walk_own
from rewriter.analyze.training.readings import OF_OBJECTS, viewed
from rewriter.analyze.training.roles import Roles, Var

_KEEPING = OF_TWO | {"lerp"}


def extremes(file: File, roles: Roles) -> dict[ast.expr, list[ast.Name]]:
    """What variables that hold such a loss are given, each with the losses in it; none on which anything is trained."""
    made: dict[Var, list[tuple[ast.expr, ast.Assign]]] = {}
    for statement in (node for node in file.nodes if isinstance(node, ast.Assign)):
        for target, value in assigned_by(statement):
            if (variable := roles.var(target)) is not None:
                made.setdefault(variable, []).append((value, statement))
    found: dict[ast.expr, list[ast.Name]] = {}
    for variable, given in made.items():
        losses = {value: _chosen(roles, variable, value) for value, _ in given}
        if any(_compares(file, roles, variable, value, statement) for value, statement in given):
            if all(names is not None for names in losses.values()) and not _is_trained(file, roles, variable, given):
                found |= {value: names for value, names in losses.items() if names}
    return found


def _is_trained(file: File, roles: Roles, variable: Var, given: list[tuple[ast.expr, ast.Assign]]) -> bool:
    """Whether backward is called on what a variable holds, or may be where it is returned."""
    if variable in roles.trained:
        return True
    function = file.names.function_of(given[0][1])
    own = [item for statement in (function.body if function is not None else ()) for item in walk_own(statement)]
    returned = [item for node in own if isinstance(node, ast.Return) and node.value for item in walk(node.value)]
    return any(roles.var(item) == variable for item in returned) and not any(map(is_backward, own))


def _chosen(roles: Roles, variable: Var, value: ast.expr) -> list[ast.Name] | None:
    """The losses that become, or may become, what a variable holds; None if it is made of them otherwise."""
    names: list[ast.Name] = []
    for part in _sides(value):
        if any(read_out(item) is not None for item in walk(part)):
            continue  # a number, which is averaged where it is read
        tensor = viewed(part)
        if isinstance(tensor, ast.Name) and roles.var(tensor) in roles.losses:
            names += [tensor] if roles.var(tensor) != variable else []
        elif any(roles.var(item) in roles.losses - {variable} for item in walk(part) if isinstance(item, ast.Name)):
            return None
    return names


def _sides(value: ast.expr) -> list[ast.expr]:
    """``a`` and ``b`` of ``min(a, b)``, ``torch.minimum(a, b)``, ``a.min(b)`` and ``a if a < b else b``."""
    match value:
        case ast.IfExp(body=one, orelse=other):
            return [*_sides(one), *_sides(other)]
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as parts) if name in _KEEPING:
            return [side for part in parts for side in _sides(part)]
        case ast.Call(func=ast.Attribute(value=owner, attr=attr), args=[first, *others]) if attr in _KEEPING:
            if dotted(owner) in {"torch", "np", "numpy"}:
                return [*_sides(first), *_sides(others[0])] if others else [value]
            return [*_sides(owner), *_sides(first)]
    return [value]


def _compares(file: File, roles: Roles, variable: Var, value: ast.expr, statement: ast.stmt) -> bool:
    """Whether what a variable holds is compared or mixed with what it is to be given."""
    names = [item for item in walk(value) if isinstance(item, (ast.Name, ast.Attribute))]
    calls = [sides for item in walk(value) if isinstance(item, ast.Call) and len(sides := _sides(item)) > 1]
    if any(roles.var(viewed(side)) == variable for sides in calls for side in sides):
        return True
    given = {roles.var(name) for name in names} - {variable, None}
    tests = [parent.test for parent in file.names.ancestors(statement) if isinstance(parent, ast.If)]
    tests += [item.test for item in walk(value) if isinstance(item, ast.IfExp)]
    for test in (item for each in tests for item in walk(each) if isinstance(item, ast.Compare)):
        if not isinstance(test.ops[0], OF_OBJECTS):
            compared = {roles.var(item) for item in walk(test) if isinstance(item, (ast.Name, ast.Attribute))}
            if variable in compared and given & compared:
                return True
    return False
