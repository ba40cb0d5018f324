"""Folders that a script makes: what happens if another rank has made them a moment before."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.read.project import Project

_QUESTIONS = {"exists", "isdir", "is_dir", "lexists"}
_CAUGHT = {"OSError", "FileExistsError", "Exception", "BaseException", "EnvironmentError", "IOError"}


def fails_if_there(file: File, project: Project, call: ast.Call) -> bool:
    """Whether a call makes a folder and fails where there is one, and nothing around it takes that for fine."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    allowed = given.get("exist_ok")
    if None in given or (isinstance(allowed, ast.Constant) and allowed.value is not False):
        return False
    if not isinstance(allowed, (ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Call, type(None))):
        return False  # computed on the spot: most often for the ranks of a launcher
    name = project.external(file, call.func)
    if name in {"os.makedirs", "os.mkdir"}:
        made = 0 < len(call.args) < 3 and not any(isinstance(item, ast.Starred) for item in call.args)
    else:
        method = isinstance(call.func, ast.Attribute) and call.func.attr == "mkdir"
        made = method and not name and not call.args and set(given) <= {"parents", "exist_ok", "mode"}
    return made and not any(isinstance(parent, ast.Try) and _catches(parent) for parent in file.names.ancestors(call))


def _catches(node: ast.Try) -> bool:
    return any(
        handler.type is None or any((dotted(item) or "").split(".")[-1] in _CAUGHT for item in walk(handler.type))
        for handler in node.handlers
    )


def is_asked_for(file: File, call: ast.Call) -> bool:
    """Whether a folder is only made where there is none: under a test, or behind one that leaves."""
    child: ast.AST = call
    for parent in file.names.ancestors(call):
        if isinstance(parent, (ast.If, ast.IfExp)):
            body = parent.body if isinstance(parent.body, list) else [parent.body]
            if asks(parent.test) and (_is_negated(parent.test) or not any(child is item for item in body)):
                return True
        if isinstance(child, ast.stmt):
            block = file.names.siblings(child)
            if any(_leaves(item) for item in block[: block.index(child)]):
                return True
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return False
        child = parent
    return False


def done_when_made(file: File, project: Project, call: ast.Call) -> ast.If | None:
    """The test for a folder by which more is done than to make it: ``if not exists(out): makedirs(out); note(out)``."""
    statement = file.names.statement_of(call)
    test = file.names.parents.get(statement)
    if not isinstance(test, ast.If) or not asks(test.test) or not _is_negated(test.test):
        return None
    if not any(statement is item for item in test.body):
        return None
    more = (item for item in test.body if item is not statement and not _only_makes(file, project, item))
    return test if any(True for _ in more) else None


def _only_makes(file: File, project: Project, statement: ast.stmt) -> bool:
    """Whether a statement makes or opens a folder, or only says nothing."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return isinstance(statement, ast.Pass)
    call = statement.value
    return project.external(file, call.func) in {"os.makedirs", "os.mkdir", "os.chmod"} or fails_if_there(
        file, project, call
    )


def asks(test: ast.AST) -> bool:
    """Whether a test asks if a file or folder is there."""
    return any(
        isinstance(item, ast.Call) and getattr(item.func, "attr", getattr(item.func, "id", "")) in _QUESTIONS
        for item in walk(test)
    )


def _is_negated(test: ast.expr) -> bool:
    for item in walk(test):
        if isinstance(item, ast.UnaryOp) and isinstance(item.op, ast.Not) and asks(item.operand):
            return True
        if isinstance(item, ast.Compare) and asks(item.left) and isinstance(item.comparators[0], ast.Constant):
            positive = isinstance(item.ops[0], (ast.Eq, ast.Is))
            return bool(item.comparators[0].value) is not positive
    return False


def _leaves(statement: ast.stmt) -> bool:
    """``if os.path.exists(path): return``."""
    return (
        isinstance(statement, ast.If)
        and asks(statement.test)
        and not _is_negated(statement.test)
        and isinstance(statement.body[-1], (ast.Return, ast.Continue, ast.Break))
    )


def refusals_to_go_on(file: File) -> Iterator[ast.If | ast.While]:
    """Tests that find what another rank has made: ``if exists(path): raise``, ``while exists(path): ...``."""
    for node in file.nodes:
        if isinstance(node, ast.While) and asks(node.test):
            yield node
        elif isinstance(node, ast.If) and asks(node.test) and not _is_negated(node.test):
            last = node.body[-1]
            call = last.value if isinstance(last, ast.Expr) else None
            ends = isinstance(call, ast.Call) and (dotted(call.func) or "").split(".")[-1] in {"exit", "error"}
            if ends or isinstance(last, ast.Raise):
                yield node


def asked_by_all(file: File, block: list[ast.stmt]) -> Iterator[ast.While]:
    """``while exists(path): number += 1`` where every rank comes to it once: where a script starts, in no loop."""
    for node in refusals_to_go_on(file):
        for parent in (node, *file.names.ancestors(node)):
            if not isinstance(node, ast.While) or (parent is not node and not isinstance(parent, ast.If)):
                break
            if any(parent is statement for statement in block):
                yield node
