"""Objects of the project's classes: which class a variable's value has, which methods run, what functions are given."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, positional, walk, walk_own
from rewriter.analyze.training.roles import Roles, Var

_DEEP = 4


class Instances:
    """Answers for all files of a project; calls are looked for in those that ``files`` gives."""

    def __init__(self, classes: Classes, roles: dict[File, Roles], files: Callable[[], Iterable[File]]) -> None:
        self.classes = classes
        self.project = classes.project
        self.roles = roles
        self.files = files
        self._classes: dict[tuple[File, Var], ClassInfo | None] = {}

    def class_of(self, file: File, node: ast.expr, deep: int = 0) -> ClassInfo | None:
        """The class of the project that an expression's value is an object of, where it is seen."""
        if isinstance(node, ast.Name) and node.id in {"self", "cls"}:
            owner = file.names.class_of(node)
            return file.class_info(owner) if owner is not None else None
        if isinstance(node, ast.Call):
            found = self.project.resolve(file, node.func)
            if isinstance(found, FunctionInfo) and deep <= _DEEP:
                made = (self.class_of(found.file, value, deep + 1) for value in _returned(found.node))
                return next((item for item in made if item is not None), None)
            return found if isinstance(found, ClassInfo) else None
        variable = self.roles[file].var(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        return None if variable is None else self.class_held(file, variable, deep)

    def class_held(self, file: File, variable: Var, deep: int = 0) -> ClassInfo | None:
        """The class of the project that a variable's value is an object of, where it is seen."""
        if deep > _DEEP:
            return None
        key = file, variable
        if key not in self._classes:
            self._classes[key] = None
            self._classes[key] = self._class_of(file, variable, deep)
        return self._classes[key]

    def _class_of(self, file: File, variable: Var, deep: int) -> ClassInfo | None:
        for value in self._values(file).get(variable, ()):
            found = self.class_of(file, value, deep + 1)
            if found is not None:
                return found
        scope, name = variable
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)) and "." not in name:
            for argument in (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs):
                if argument.arg == name and argument.annotation is not None:
                    annotated = self.project.resolve(file, argument.annotation)
                    if isinstance(annotated, ClassInfo):
                        return annotated
            for other, value in self.given(file, scope, name):
                found = self.class_of(other, value, deep + 1)
                if found is not None:
                    return found
        return None

    def _values(self, file: File) -> dict[Var, list[ast.expr]]:
        if file not in self._assigned:
            table = self._assigned[file] = {}
            for variable, value, _, part in self.roles[file].assignments:
                if not part:
                    table.setdefault(variable, []).append(value)
        return self._assigned[file]

    @cached_property
    def _assigned(self) -> dict[File, dict[Var, list[ast.expr]]]:
        return {}

    def methods(self, file: File, func: ast.Attribute) -> list[FunctionInfo]:
        """The method of the project that ``x.method`` is, by the class of ``x``."""
        owner = self.class_of(file, func.value)
        method = self.classes.method(owner, func.attr) if owner is not None else None
        return [method[0].file.function_info(method[1])] if method is not None else []

    def called(self, file: File, func: ast.expr) -> list[FunctionInfo]:
        """The ``__call__`` that runs where an object is called."""
        owner = self.class_of(file, func)
        method = self.classes.method(owner, "__call__") if owner is not None else None
        return [method[0].file.function_info(method[1])] if method is not None else []

    def signal_handlers(self, file: File) -> Iterator[tuple[ast.Call, list[FunctionInfo]]]:
        """The calls ``signal.signal(signal.SIGTERM, handler)`` of a file, each with the handlers that are seen."""
        for call in file.calls if b"signal" in file.source.data else ():
            if self.project.external(file, call.func) == "signal.signal" and len(call.args) == 2:
                yield call, self.functions(file, call.args[1])

    def functions(self, file: File, node: ast.expr) -> list[FunctionInfo]:
        """The function, or methods, that an expression is a name of."""
        found = self.project.resolve(file, node)
        functions = [found] if isinstance(found, FunctionInfo) else []
        return functions + (self.methods(file, node) if isinstance(node, ast.Attribute) else [])

    def given_to(self, file: File, node: ast.expr) -> Iterator[tuple[File, ast.expr]]:
        """What a variable is assigned, goes through in a loop, holds as a list, or gets as a parameter."""
        if isinstance(node, ast.Attribute):
            owner = self.class_of(file, node.value)
            if owner is not None:
                for item in (inner for method in owner.methods.values() for inner in walk(method)):
                    if isinstance(item, ast.Assign) and any(dotted(t) == f"self.{node.attr}" for t in item.targets):
                        yield owner.file, item.value
        variable = self.roles[file].var(node)
        if variable is None:
            return
        yield from ((file, value) for value in self._values(file).get(variable, ()))
        yield from ((file, value) for value in self._items(file).get(variable, ()))
        scope, name = variable
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from self.given(file, scope, name)

    def _items(self, file: File) -> dict[Var, list[ast.expr]]:
        """By loop variable, what is gone through; by list, what is appended."""
        if file not in self._held:
            table = self._held[file] = {}
            for node in file.nodes:
                match node:
                    case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                        held = target
                    case ast.Call(func=ast.Attribute(value=held, attr="append"), args=[value]):
                        pass
                    case _:
                        continue
                variable = self.roles[file].var(held)
                if variable is not None:
                    table.setdefault(variable, []).append(value)
        return self._held[file]

    @cached_property
    def _held(self) -> dict[File, dict[Var, list[ast.expr]]]:
        return {}

    def named(self, name: str) -> list[FunctionInfo]:
        """All methods of the project's training files that have a name."""
        return self._methods.get(name, [])

    @cached_property
    def _methods(self) -> dict[str, list[FunctionInfo]]:
        found: dict[str, list[FunctionInfo]] = {}
        for file in self.files():
            for info in self.classes.all(file):
                for name, method in info.methods.items():
                    found.setdefault(name, []).append(file.function_info(method))
        return found

    @cached_property
    def attributes(self) -> dict[str, list[tuple[File, ast.Attribute, ast.expr, ast.stmt]]]:
        """By name, what attributes of other objects than ``self`` are given: file, target, value, statement."""
        found: dict[str, list[tuple[File, ast.Attribute, ast.expr, ast.stmt]]] = {}
        for file in self.files():
            for node in file.nodes:
                if isinstance(node, (ast.Assign, ast.AugAssign)):
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") not in {"self", "cls"}:
                            found.setdefault(target.attr, []).append((file, target, node.value, node))
        return found

    # Arguments -------------------------------------------------------------------------------------------------

    def given(self, file: File, function: Function, name: str) -> Iterator[tuple[File, ast.expr]]:
        """What the calls of a function give for one of its parameters."""
        listed = positional(function)
        named = {argument.arg for argument in function.args.kwonlyargs}
        if name not in listed and name not in named:
            return
        method = isinstance(file.names.parents.get(function), ast.ClassDef)
        if method and listed[:1] == [name]:
            return
        for other, call in self.calls(file, function):
            yield from ((other, keyword.value) for keyword in call.keywords if keyword.arg == name)
            if name in listed:
                index = listed.index(name) - (1 if method and listed[0] in {"self", "cls"} else 0)
                if 0 <= index < len(call.args) and not any(isinstance(a, ast.Starred) for a in call.args[: index + 1]):
                    yield other, call.args[index]

    def given_rest(self, file: File, function: Function, name: str) -> Iterator[tuple[File, ast.Tuple]]:
        """What each call of a function gives for its ``*name``."""
        if function.args.vararg is None or function.args.vararg.arg != name:
            return
        before = len(positional(function)) - isinstance(file.names.parents.get(function), ast.ClassDef)
        for other, call in self.calls(file, function):
            yield other, ast.copy_location(ast.Tuple(call.args[before:], ast.Load()), call)

    def calls(self, file: File, function: Function) -> Iterator[tuple[File, ast.Call]]:
        """The calls of a function, each with its file."""
        owner = file.names.parents.get(function)
        if not isinstance(owner, ast.ClassDef):
            for other, call in self._by_name.get(function.name, ()):
                found = self.project.resolve(other, call.func)
                if isinstance(found, FunctionInfo) and found.node is function:
                    yield other, call
            return
        cls = file.class_info(owner)
        family = {cls, *self.classes.descendants(cls)}
        if function.name == "__init__":
            for member in family:
                for other, call in self._by_name.get(member.name, ()):
                    if self.project.resolve(other, call.func) is member:
                        yield other, call
            return
        if function.name == "__call__":
            for other, call in self._calls_of_objects:
                if self.class_of(other, call.func) in family:
                    yield other, call
            return
        for other, call in self._by_name.get(function.name, ()):
            if isinstance(call.func, ast.Attribute):
                known = self.class_of(other, call.func.value)
                if known is None or known in family or cls in self.classes.descendants(known):
                    yield other, call

    @cached_property
    def _by_name(self) -> dict[str, list[tuple[File, ast.Call]]]:
        found: dict[str, list[tuple[File, ast.Call]]] = {}
        for file in self.files():
            for call in file.calls:
                name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                found.setdefault(name, []).append((file, call))
        return found

    @cached_property
    def _calls_of_objects(self) -> list[tuple[File, ast.Call]]:
        """Calls of names and attributes that are no functions or classes."""
        return [
            (file, call)
            for file in self.files()
            for call in file.calls
            if isinstance(call.func, (ast.Name, ast.Attribute)) and self.project.resolve(file, call.func) is None
        ]


def _returned(function: Function) -> Iterator[ast.expr]:
    """What a function returns itself."""
    for node in (node for statement in function.body for node in walk_own(statement)):
        if isinstance(node, ast.Return) and node.value is not None:
            yield node.value
