"""Whether all ranks come to a statement, as often as each other, so that they can wait for each other there."""

from __future__ import annotations

import ast

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import Function, dotted, walk_own
from rewriter.analyze.training.collectives import as_guard, asks_for_launcher, is_other_rank_test
from rewriter.analyze.training.decisions import Decisions
from rewriter.analyze.training.entries import is_main_test
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.varying import of_rank, strides_by_rank

_LEAVES = (ast.Return, ast.Continue, ast.Break)
_ALONE = (
    ast.ClassDef, ast.Lambda, ast.AsyncFunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
    ast.While, ast.AsyncFor, ast.ExceptHandler,
)  # fmt: skip


class Reached:
    """Answers for all files of a project; where it is not seen, the answer is no."""

    def __init__(self, scripts: Scripts, decisions: Decisions) -> None:
        self.scripts = scripts
        self.decisions = decisions
        self._functions: dict[ast.AST, bool] = {}

    def by_all(self, file: File, node: ast.AST) -> bool:
        child = node
        for parent in file.names.ancestors(node):
            if isinstance(child, ast.stmt) and not self._is_passed_by_all(file, child):
                return False
            if isinstance(parent, ast.FunctionDef):
                return self._function(file, parent)
            if isinstance(parent, _ALONE) or (isinstance(parent, ast.Try) and not all(map(_raises, parent.handlers))):
                return False
            if isinstance(parent, ast.With) and any(_suppresses(item.context_expr) for item in parent.items):
                return False
            if isinstance(parent, (ast.If, ast.IfExp)) and child is not parent.test and self._parts(file, parent):
                return False
            if isinstance(parent, ast.For) and child is not parent.iter and self._goes_apart(file, parent):
                return False
            child = parent
        return file in self.scripts.programs

    def _parts(self, file: File, node: ast.If | ast.IfExp) -> bool:
        """Whether ranks may answer a test differently."""
        if isinstance(node, ast.If) and as_guard(file, node) is not None:
            return node not in self.scripts.opened_guards(file)
        if asks_for_launcher(file, node.test):
            return False
        if isinstance(node, ast.If) and (lifted := self.scripts.lifted_exits(file).get(node)) is not None:
            return any(self.decisions.varying.varies(file, operand) for operand in lifted.rest)
        if is_other_rank_test(file, node.test) or of_rank(file, node.test) or "rank" in ast.unparse(node.test).lower():
            return True
        return node not in self.decisions.of(file) and self.decisions.varying.varies(file, node.test)

    def _goes_apart(self, file: File, loop: ast.For) -> bool:
        if loop in self.decisions.of(file):
            return False
        varying = self.decisions.varying
        return (
            strides_by_rank(file, loop.iter)
            or varying.lists(file, loop.iter)
            or "rank" in ast.unparse(loop.iter).lower()
        )

    def _is_passed_by_all(self, file: File, statement: ast.stmt) -> bool:
        """Whether nothing in front of a statement, in its block, makes one rank leave before it."""
        block = file.names.siblings(statement)
        for other in block[: next(i for i, item in enumerate(block) if item is statement)]:
            if isinstance(other, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            for jump in (item for item in walk_own(other) if isinstance(item, _LEAVES)):
                for parent in file.names.ancestors(jump):
                    if isinstance(parent, ast.ExceptHandler) or (
                        isinstance(parent, ast.If) and self._parts(file, parent)
                    ):
                        return False
                    if parent is other:
                        break
        return True

    def _function(self, file: File, function: ast.FunctionDef) -> bool:
        """Whether all ranks call a function: its calls are seen, and all ranks come to each."""
        if function not in self._functions:
            self._functions[function] = False  # in a function that calls itself
            self._functions[function] = self._is_called_by_all(file, function)
        return self._functions[function]

    def _is_called_by_all(self, file: File, function: ast.FunctionDef) -> bool:
        own = [item for statement in function.body for item in walk_own(statement)]
        if any(isinstance(item, (ast.Yield, ast.YieldFrom)) for item in own):
            return False
        if any(block is function.body for block in self.scripts.entries.values()):
            return True
        if self._is_handed_on(function):
            return False
        calls = [
            (other, call)
            for other, call in self.scripts.collectives.instances.calls(file, function)
            if (other in self.scripts.programs or not any(map(is_main_test, other.names.ancestors(call))))
            and not self._is_of_a_model(other, call, file, function)
        ]
        return bool(calls) and all(self.by_all(other, call) for other, call in calls)

    def _is_of_a_model(self, file: File, call: ast.Call, where: File, function: ast.FunctionDef) -> bool:
        """Whether a call by a name is the model's, ``self.model.train()``, and the function is no model's."""
        owner = where.names.class_of(function)
        module = owner is not None and self.scripts.classes.is_module(where.class_info(owner))
        func = call.func
        return not module and isinstance(func, ast.Attribute) and self.scripts.roles[file].is_model(func.value)

    def _is_handed_on(self, function: Function) -> bool:
        """Whether a function, or a method of its name, is given to others to call, who may be one rank's workers."""
        for file in self.scripts.training:
            if function.name.encode() not in file.source.data:
                continue
            for node in file.nodes:
                named = (isinstance(node, ast.Name) and node.id == function.name) or (
                    isinstance(node, ast.Attribute) and node.attr == function.name
                )
                parent = file.names.parents.get(node)
                if named and not (isinstance(parent, ast.Call) and parent.func is node):
                    return True
        return False


def _raises(handler: ast.ExceptHandler) -> bool:
    """Whether an error goes on, as it is or as another: then no rank goes on behind it."""
    return isinstance(handler.body[-1], ast.Raise)


def _suppresses(expression: ast.expr) -> bool:
    called = expression.func if isinstance(expression, ast.Call) else expression
    return (dotted(called) or "").split(".")[-1] in {"suppress", "raises", "assertRaises"}
