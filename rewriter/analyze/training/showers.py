"""Functions of the project that only show what they are given: ``report(step, loss)``, ``text(total / count)``."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import Function, walk
from rewriter.analyze.training.instances import Instances
from rewriter.analyze.training.writers import SHOWING_METHODS

READERS = {"item", "tolist", "numpy"}
VIEWS = {"detach", "cpu", "float", "double", "mean", "clone", "to", "squeeze", "numpy"}
NUMBERS = {"float", "str", "repr"}
_OF_NUMBERS = {*NUMBERS, "round", "abs", "int", "max", "min", "isinstance"}
_SHOWING = SHOWING_METHODS | {"format", "write", "warning", "log", "append"}
_INNER = (ast.BinOp, ast.UnaryOp, ast.Tuple, ast.List, ast.Dict, ast.IfExp, ast.keyword, ast.Compare, ast.BoolOp)
_DEEP = 3


class Showers:
    """Answers for all files of a project."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._found: dict[Function, set[str]] = {}

    def shown(self, file: File, call: ast.Call, deep: int = 0) -> Iterator[ast.expr]:
        """What a call gives a function, or a method of a class that is seen, which only shows it."""
        functions = self._instances.functions(file, call.func) if call.args or call.keywords else []
        if len(functions) == 1 and not any(isinstance(item, ast.Starred) for item in call.args):
            names = self._of(functions[0], deep)
            yield from (value for name, value in functions[0].given(call) if name in names)

    def _of(self, function: FunctionInfo, deep: int) -> set[str]:
        """The parameters that a function only shows."""
        if function.node not in self._found:
            self._found[function.node] = set()  # of one that calls itself
            owner = function.file.names.class_of(function.node)
            of_model = owner is not None and self._instances.classes.is_module(function.file.class_info(owner))
            if not of_model and deep < _DEEP:
                self._found[function.node] = {
                    name for name in function.parameters if self._only_shows(function, name, deep)
                }
        return self._found[function.node]

    def _only_shows(self, function: FunctionInfo, name: str, deep: int) -> bool:
        held, seen, shows = {name}, set[ast.Name](), False
        while True:
            new = [n for n in walk(function.node) if isinstance(n, ast.Name) and n.id in held and n not in seen]
            if not new:
                return shows
            for node in new:
                seen.add(node)
                if isinstance(node.ctx, ast.Load):
                    end = self._end(function, node, held, deep)
                    if not end:
                        return False
                    shows = shows or end == "shown"

    def _end(self, function: FunctionInfo, node: ast.expr, held: set[str], deep: int) -> str:
        """Where a value ends: ``shown``, ``kept`` in a name that is then held, too, or nowhere that is known."""
        file, read = function.file, False
        child: ast.AST = node
        for parent in file.names.ancestors(node):
            match parent:
                case ast.Attribute(attr=attr) if attr in VIEWS | READERS | {"data"}:
                    read = read or attr in READERS
                case ast.Call(func=func) if func is child:
                    pass
                case ast.FormattedValue() | ast.Call(func=ast.Name(id="print") | ast.Attribute(attr="print_rank")):
                    return "shown"
                case ast.Call(func=ast.Name(id=called)) if called in _OF_NUMBERS:
                    read = read or called in NUMBERS
                case ast.Call(func=ast.Attribute(attr=attr)) if attr in _SHOWING:
                    return "shown" if attr != "append" or read else ""
                case ast.Call():
                    return "shown" if any(child is given for given in self.shown(file, parent, deep + 1)) else ""
                case ast.BinOp(left=ast.Constant(value=str()), op=ast.Mod()):
                    return "shown"
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AugAssign(target=ast.Name(id=name)) if not read:
                    held.add(name)
                    return "kept"
                case ast.stmt():
                    return "shown" if read or isinstance(parent, (ast.If, ast.While)) else ""
                case _ if not isinstance(parent, _INNER):
                    return ""
            child = parent
        return ""
