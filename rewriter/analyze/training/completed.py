"""Where a model gets its last parameters: after ``from_pretrained`` come more tokens, or an adapter around it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk, walk_own
from rewriter.analyze.read.project import Project
from rewriter.analyze.training.roles import Roles, Var

RESIZES = {"resize_token_embeddings", "resize_position_embeddings", "add_adapter"}
_LEAVES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def completing(file: File, project: Project, roles: Roles, variable: Var, made: ast.stmt) -> ast.stmt | None:
    """The last statement behind ``made``, in its block or one around it, that changes which parameters a model has,
    before anybody uses it; the one that wraps it, if there is one.
    """
    found = None
    for statement in _behind(file, made):
        if is_wrapped_in(project, file, roles, variable, statement):
            return statement
        changed = any(_changes(project, file, roles, variable, item) for item in (statement, *walk_own(statement)))
        if isinstance(statement, (ast.For, ast.While)) and changed:
            return found
        if changed:
            found = statement
        elif any(_uses(project, file, roles, variable, item) for item in walk_own(statement)):
            return found
    return found


def _behind(file: File, statement: ast.stmt) -> Iterator[ast.stmt]:
    while True:
        block = file.names.siblings(statement)
        yield from block[block.index(statement) + 1 :]
        parent = file.names.parents[statement]
        if isinstance(parent, _LEAVES) or not isinstance(parent, (ast.If, ast.With, ast.Try)):
            return
        statement = parent


def _uses(project: Project, file: File, roles: Roles, variable: Var, node: ast.AST) -> bool:
    """Whether a call needs the model complete: it runs it, or gives it or its parameters to others, as an optimizer."""
    if not isinstance(node, ast.Call):
        return False
    if roles.var(node.func) == variable:
        return True
    if project.external(file, node.func).split(".")[0] in {"peft", "print", "isinstance", "hasattr", "getattr", "len"}:
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    return any(roles.var(item) == variable for value in given for item in walk(value))


def _changes(project: Project, file: File, roles: Roles, variable: Var, node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=receiver, attr=name)) if name in RESIZES:
            return roles.var(receiver) == variable
        case ast.Assign(targets=[target], value=ast.Call() as call):
            return roles.var(target) == variable and is_adapted(project, file, roles, call) == variable
    return False


def is_adapted(project: Project, file: File, roles: Roles, call: ast.Call) -> Var | None:
    """The model that a call of peft puts adapters around."""
    if not project.external(file, call.func).startswith("peft."):
        return None
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "model")]
    return roles.var(given[0]) if given else None


def is_wrapped_in(project: Project, file: File, roles: Roles, variable: Var | None, statement: ast.AST) -> bool:
    """``model = bmt.BMTrainModelWrapper(model)``, and the like with an adapter inside."""
    match statement:
        case ast.Assign(targets=[target], value=ast.Call(args=[given]) as call):
            wraps = project.external(file, call.func) == "bmtrain.BMTrainModelWrapper"
            return wraps and roles.var(target) == variable and any(roles.var(item) == variable for item in walk(given))
    return False
