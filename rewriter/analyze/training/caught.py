"""Errors that a rank may meet and catch alone, around calls that all ranks must make."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable, Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk_own
from rewriter.analyze.training.scripts import Scripts

EXITS = {"exit", "quit", "sys.exit", "os._exit"}
_OF_RUNS = {
    "RuntimeError", "OutOfMemoryError", "Exception", "BaseException", "AcceleratorError", "ValueError",
    "ArithmeticError", "FloatingPointError", "AssertionError", "IndexError", "KeyError", "TypeError", "LookupError",
}  # fmt: skip
_RUNS = {"backward", "step", "generate", "forward"}


class Caught:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts
        self.project = scripts.project

    def alone(self, file: File, node: ast.Try, for_all: Container[ast.AST]) -> Iterator[ast.ExceptHandler]:
        """The handlers in which a rank that met an error of training alone goes on, or makes a call ``for_all``."""
        if not self._trains(file, node.body):
            return
        for handler in node.handlers:
            if not caught_names(handler) & _OF_RUNS or self._is_raised_by_many(file, handler):
                continue
            if not leaves(handler.body) or self._holds(handler.body, for_all):
                yield handler

    def interrupted(self, file: File, node: ast.Try, for_all: Container[ast.AST]) -> ast.stmt | None:
        """What behind Ctrl-C, or any error, makes a call ``for_all``: ranks come to it from other places."""
        if not self._trains(file, node.body):
            return None
        stopped = [h for h in node.handlers if caught_names(h) <= {"KeyboardInterrupt", "SystemExit"}]
        blocks = [*(handler.body for handler in stopped), node.finalbody]
        if not all(leaves(handler.body) for handler in stopped):
            blocks += list(_behind(file, node))
        return next((item for block in blocks for item in block if self._holds([item], for_all)), None)

    def stopped_by_hand(self, file: File, node: ast.Try) -> bool:
        """Whether Ctrl-C is caught around training, whose ranks can take it after the same step."""
        return self._trains(file, node.body) and any(
            "KeyboardInterrupt" in caught_names(handler) for handler in node.handlers
        )

    def is_stopped_together(self, file: File, node: ast.Try) -> bool:
        """``try: with bmt.interrupted_together(): ...``"""
        match node.body:
            case [ast.With(items=[ast.withitem(context_expr=ast.Call(func=func)), *_])]:
                return self.project.external(file, func).endswith(".interrupted_together")
        return False

    def in_handler(self, file: File, node: ast.AST) -> bool:
        """Whether a node is reached by an error that a rank may have met alone while it trained."""
        child = node
        for parent in file.names.ancestors(node):
            if isinstance(parent, ast.Try) and isinstance(child, ast.ExceptHandler):
                if caught_names(child) & _OF_RUNS and self._trains(file, parent.body):
                    return True
            child = parent
        return False

    def suppressed(self, file: File, node: ast.With) -> bool:
        """Whether a block that trains passes over errors: ``with contextlib.suppress(RuntimeError):``."""
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and self.project.external(file, call.func) == "contextlib.suppress":
                if {_last(kind) for kind in call.args} & _OF_RUNS:
                    return self._trains(file, node.body)
        return False

    def _trains(self, file: File, body: Iterable[ast.stmt]) -> bool:
        roles, kind = self.scripts.roles[file], self.scripts.feeds.kind
        for item in (item for statement in body for item in walk_own(statement)):
            if isinstance(item, ast.Call):
                if roles.is_model(item.func) or kind(file, item):
                    return True
                if isinstance(item.func, ast.Attribute) and item.func.attr in _RUNS:
                    receiver = roles.var(item.func.value)
                    if item.func.attr == "backward" or receiver in roles.optimizers or roles.is_model(item.func.value):
                        return True
        return False

    def _is_raised_by_many(self, file: File, handler: ast.ExceptHandler) -> bool:
        """Whether a handler begins with ``if bmt.world_size() > 1: raise``."""
        match handler.body[0]:
            case ast.If(test=ast.Compare(left=ast.Call(func=func)), body=[ast.Raise()]):
                return self.project.external(file, func) == "bmtrain.world_size"
        return False

    @staticmethod
    def _holds(block: Iterable[ast.stmt], for_all: Container[ast.AST]) -> bool:
        return any(item in for_all for statement in block for item in walk_own(statement))


def _behind(file: File, node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The statements that follow one, in its block and those around it in its function."""
    while True:
        block = file.names.siblings(node)
        yield block[block.index(node) + 1 :]
        parent = file.names.parents[node]
        if not isinstance(parent, ast.stmt) or isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        node = parent


def leaves(block: list[ast.stmt]) -> bool:
    """Whether whoever enters a block raises an error or ends the process in it, whichever way it goes."""
    jumps = (ast.Return, ast.Break, ast.Continue)
    if any(isinstance(item, jumps) for statement in block for item in walk_own(statement)):
        return False
    return any(_leaves(statement) for statement in block)


def _leaves(statement: ast.stmt) -> bool:
    match statement:
        case ast.Raise():
            return True
        case ast.Expr(value=ast.Call(func=func)):
            return (dotted(func) or "") in EXITS
        case ast.If(body=body, orelse=orelse):
            return leaves(body) and leaves(orelse)
        case ast.With(body=body):
            return leaves(body)
        case ast.Try(body=body, handlers=handlers, finalbody=final):
            return leaves(final) or (leaves(body) and all(leaves(handler.body) for handler in handlers))
    return False


def caught_names(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"BaseException"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {_last(kind) for kind in kinds}


def _last(kind: ast.expr) -> str:
    return (dotted(kind) or "").split(".")[-1]
