"""Tests by which a script chooses between one process and several, and whether the launch answers them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, is_backward, walk
from rewriter.analyze.training.scripts import Scripts

_JOINS = "torch.distributed.init_process_group"
_SHARES = "torch.utils.data.DistributedSampler"
_SPAWNS = "torch.multiprocessing.spawn"
_TOLD = {
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "local_rank",
    "__name__",
}  # fmt: skip
"""What torchrun sets in the environment, and what a launched script is; a parser's ``local_rank`` gets its value."""
_KNOWN = ("torch.distributed.", "torch.cuda.device_count", "torch.cuda.is_available", "bmtrain.")
_DEEP = 3


class SeveralRanks:
    """Answers for all training scripts of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts, self.project = scripts, scripts.project

    def unanswered(self, file: File) -> list[ast.expr]:
        """The tests in a file that keep ranks apart unless the user says otherwise: ``if args.distributed:``."""
        return self._found.get(file, [])

    @cached_property
    def _found(self) -> dict[File, list[ast.expr]]:
        found: dict[File, list[ast.expr]] = {}
        named = [(f, c, self.project.external(f, c.func)) for f in self.scripts.training for c in f.calls]
        names = {name for _, _, name in named}
        if _SPAWNS in names:  # the test of the start decides
            return found
        asked = _JOINS if _JOINS in names else _SHARES
        for file, call, name in named:
            for place, test in self._tests(file, call, 0) if name == asked else ():
                if not self._is_answered(place, test, 0) and test not in found.setdefault(place, []):
                    found[place].append(test)
        return {file: tests for file, tests in found.items() if tests}

    def _tests(self, file: File, call: ast.expr, deep: int) -> Iterator[tuple[File, ast.expr]]:
        """The tests on which a call, and those of the function that it stands in, depend."""
        function = file.names.function_of(call)
        child: ast.AST = call
        for parent in file.names.ancestors(call):
            match parent:
                case ast.If(test=test) if child is not test and not any(self._trains(file, s) for s in parent.body):
                    yield file, test
                case ast.IfExp(test=test) if child is not test:
                    yield file, test
            if parent is function:
                break
            child = parent
        if function is None or self.scripts.steps(file, function) or deep == _DEEP:
            return
        for before in function.body:
            if any(item is call for item in walk(before)):
                break
            if isinstance(before, ast.If) and isinstance(before.body[-1], ast.Return):
                yield file, before.test
        for other in self.scripts.training:
            for inner in other.calls if other.mentions(function.name) else ():
                resolved = self.project.resolve(other, inner.func)
                if isinstance(resolved, FunctionInfo) and resolved.node is function:
                    yield from self._tests(other, inner, deep + 1)

    def _trains(self, file: File, statement: ast.stmt) -> bool:
        """Whether a statement trains: then its block is what is done, and not how."""
        for item in walk(statement):
            if isinstance(item, ast.Call):
                found = self.project.resolve(file, item.func)
                if is_backward(item):
                    return True
                if isinstance(found, FunctionInfo) and self.scripts.steps(found.file, found.node):
                    return True
        return False

    def _is_answered(self, file: File, value: ast.AST, deep: int) -> bool:
        """Whether a value comes of what torchrun sets, or of what torch and bmtrain say of the ranks."""
        for item in walk(value):
            match item:
                case ast.Constant(value=str(name)) if name in _TOLD:
                    return True
                case ast.Name() | ast.Attribute():
                    name = (dotted(item) or "").split(".")[-1]
                    if deep == 0 and any(self._is_undone(f, v) for f, v in self._values(name)):
                        return False
                    if name in _TOLD or (self.project.external(file, item) + ".").startswith(_KNOWN):
                        return True
                    if deep < _DEEP and any(self._is_answered(f, v, deep + 1) for f, v in self._values(name)):
                        return True
                case ast.Call() if deep < _DEEP:
                    found = self.project.resolve(file, item.func)
                    if isinstance(found, FunctionInfo) and self._is_answered(found.file, found.node, deep + 1):
                        return True
        return False

    def _is_undone(self, file: File, value: ast.expr) -> bool:
        """Whether a number is set where an option has its default: ``if args.group == "": count = 1``."""
        if not isinstance(value, ast.Constant):
            return False
        for parent in file.names.ancestors(value):
            match parent:
                case ast.If(test=ast.Compare(left=ast.Attribute(attr=name), ops=[ast.Eq()], comparators=[given])):
                    if isinstance(given, ast.Constant) and given.value in self._defaults.get(name, ()):
                        return any(value is item for statement in parent.body for item in walk(statement))
        return False

    @cached_property
    def _defaults(self) -> dict[str, list[object]]:
        """By name, the defaults of the command line's options."""
        found: dict[str, list[object]] = {}
        for call in (call for file in self.scripts.training for call in file.calls):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
                names = [str(item.value).lstrip("-") for item in call.args if isinstance(item, ast.Constant)]
                given = [
                    k.value.value for k in call.keywords if k.arg == "default" and isinstance(k.value, ast.Constant)
                ]
                for name in names:
                    found.setdefault(name.replace("-", "_"), []).extend(given)
        return found

    def _values(self, name: str) -> list[tuple[File, ast.expr]]:
        return self._assigned.get(name, []) if name else []  # no name: what is no plain target

    @cached_property
    def _assigned(self) -> dict[str, list[tuple[File, ast.expr]]]:
        """What the scripts assign to names, and to attributes of any object, of each name."""
        found: dict[str, list[tuple[File, ast.expr]]] = {}
        for file in self.scripts.training:
            for node in file.nodes:
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        found.setdefault((dotted(target) or "").split(".")[-1], []).append((file, node.value))
        return found
