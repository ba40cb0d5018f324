"""Tests of which the ranks' answers give the batch's: they hold for it if they do on all ranks, or on any."""

from __future__ import annotations

import ast

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, walk_own
from rewriter.analyze.read.project import Project
from rewriter.analyze.training.shares import Kinds

_ANY, _ALL = "any", "all"
_OF = {
    "any": _ANY, "isnan": _ANY, "isinf": _ANY, "all": _ALL, "isfinite": _ALL, "equal": _ALL, "allclose": _ALL,
    "array_equal": _ALL, "array_equiv": _ALL,
}  # fmt: skip
_PAIRS = {"equal", "allclose", "array_equal", "array_equiv"}
_OTHER = {"": "", _ANY: _ALL, _ALL: _ANY}
_VIEWS = {"item", "cpu", "detach", "numpy", "bool", "tolist", "squeeze", "to"}
_MODULES = {"torch", "np", "numpy", "math", "jnp"}
_DEEP = 4


class Truths:
    """Answers for all files of a project."""

    def __init__(self, project: Project) -> None:
        self.project = project

    def of(self, file: File, kinds: Kinds | None, node: ast.expr, deep: int = 0) -> str:
        """``any`` or ``all``: on how many ranks a test has to hold to hold for the batch. Empty where it is not seen.

        ``kinds`` are those of the loop that the test stands in, or None in a function of its own.
        """
        if deep > _DEEP:
            return ""
        match node:
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=inner):
                return _OTHER[self.of(file, kinds, inner, deep + 1)]
            case ast.BoolOp(op=op, values=values):
                wanted = _ANY if isinstance(op, ast.Or) else _ALL
                return wanted if all(self.of(file, kinds, value, deep + 1) == wanted for value in values) else ""
            case ast.Name(id=name) if kinds is not None:
                made = kinds.made.get(name, [])
                return self.of(file, kinds, made[0][0], deep + 1) if len(made) == 1 and made[0][1] is None else ""
            case ast.Compare(left=left, ops=[ast.NotEq()], comparators=[right]) if ast.dump(left) == ast.dump(right):
                return _ANY  # not a number
            case ast.Call():
                return self._of_call(file, kinds, node, deep)
        return ""

    def _of_call(self, file: File, kinds: Kinds | None, call: ast.Call, deep: int) -> str:
        match call.func:
            case ast.Name(id="bool") if len(call.args) == 1:
                return self.of(file, kinds, call.args[0], deep + 1)
            case ast.Name(id="any" | "all" as name):
                return name
            case ast.Attribute(value=value, attr=attr) if attr in _VIEWS:
                return self.of(file, kinds, value, deep + 1)
            case ast.Attribute(value=value, attr=attr) if attr in _OF:
                given = len(call.args) - (dotted(value) in _MODULES)  # beside what is asked
                named = {keyword.arg for keyword in call.keywords} <= {"atol", "rtol", "equal_nan"}
                return _OF[attr] if named and given <= (attr in _PAIRS) else ""  # no any(dim)
        found = self.project.resolve(file, call.func)
        if not isinstance(found, FunctionInfo):
            return ""
        returned = [item for s in found.node.body for item in walk_own(s) if isinstance(item, ast.Return)]
        if len(found.node.body) > 1 or len(returned) != 1 or returned[0].value is None:
            return ""
        return self.of(found.file, None, returned[0].value, deep + 1)
