"""Objects of the project that add up, or list, what a loop gives them: meters, averagers, metrics."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, names_in, walk, walk_own
from rewriter.analyze.training.instances import Instances
from rewriter.analyze.training.roles import Roles

_LISTS = {"append", "extend", "appendleft", "insert", "add", "update", "put"}
_DEEP = 2


@dataclass(frozen=True)
class Kept:
    """What a call gives to an object that keeps it; ``seen`` is False where that is known by the method's name only."""

    given: tuple[ast.expr, ...]
    seen: bool


class Keepers:
    """Answers for all files of a project."""

    def __init__(self, instances: Instances, roles: dict[File, Roles]) -> None:
        self._instances, self._roles = instances, roles
        self._found: dict[tuple[File, ast.Call], Kept | None] = {}
        self._methods: dict[Function, str] = {}

    def kept(self, file: File, call: ast.Call) -> Kept | None:
        """What a call leaves with an object, if its method adds it up or lists it."""
        key = file, call
        if key not in self._found:
            self._found[key] = self._kept(file, call)
        return self._found[key]

    def _kept(self, file: File, call: ast.Call) -> Kept | None:
        given = tuple(_parts((*call.args, *(keyword.value for keyword in call.keywords))))
        func, roles = call.func, self._roles[file]
        if not given or any(isinstance(item, ast.Starred) for item in given):
            return None
        if not isinstance(func, (ast.Name, ast.Attribute)) or roles.is_model(func):
            return None
        if self._instances.project.resolve(file, func) is not None:
            return None
        holder = func.value if isinstance(func, ast.Attribute) else func
        alone = isinstance(file.names.parents[call], ast.Expr)
        if self._instances.class_of(file, holder) is not None:
            methods = (
                self._instances.methods(file, func)
                if isinstance(func, ast.Attribute)
                else self._instances.called(file, func)
            )
            ways = {self._way(info) for info in methods}
            return Kept(given, seen=True) if "added" in ways or ("listed" in ways and alone) else None
        if not alone or self._is_made(file, holder):
            return None
        name = func.attr if isinstance(func, ast.Attribute) else "__call__"
        methods = [info for info in self._instances.named(name) if takes(info.node, call)]
        return Kept(given, seen=False) if any(map(self._way, methods)) else None

    def _is_made(self, file: File, holder: ast.expr) -> bool:
        """Whether it is seen what a name holds, and that is no object of the project."""
        variable = self._roles[file].var(holder)
        values = [value for value, _, part in self._roles[file].assigned(variable) if not part]
        return variable is None or any(not isinstance(value, (ast.Name, ast.Attribute)) for value in values)

    def _way(self, info: FunctionInfo, deep: int = 0) -> str:
        """``added``, ``listed``, or nothing, for what becomes of a method's arguments."""
        if info.node not in self._methods:
            self._methods[info.node] = ""
            owner = info.file.names.class_of(info.node)
            cls = info.file.class_info(owner) if owner is not None else None
            if cls is not None and not self._is_other(cls):
                self._methods[info.node] = self._way_of(info, cls, deep)
        return self._methods[info.node]

    def _is_other(self, cls: ClassInfo) -> bool:
        """Whether a class is of modules, of what trains, or of what is called only with what it gives back."""
        family = (cls, *self._instances.classes.ancestors(cls))
        return self._instances.classes.is_module(cls) or any(
            isinstance(item, ast.Attribute) and item.attr == "backward"
            for member in family
            for item in walk(member.node)
        )

    def _way_of(self, info: FunctionInfo, cls: ClassInfo, deep: int) -> str:
        arguments = info.node.args
        listed = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]
        held = {*listed, *(a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None)}
        own = [item for statement in info.node.body for item in walk_own(statement)]
        for _ in range(3):
            for item in own:
                if isinstance(item, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For)):
                    source = item.iter if isinstance(item, ast.For) else item.value
                    if source is not None and names_in(source) & held:
                        targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                        held |= {name for target in targets for name in names_in(target)} - {"self"}
        ways = {self._way_by(item, held, cls, deep) for item in own}
        return "added" if "added" in ways else "listed" if "listed" in ways else ""

    def _way_by(self, node: ast.AST, held: set[str], cls: ClassInfo, deep: int) -> str:
        match node:
            case ast.AugAssign(target=target, value=value) if _own(target) and names_in(value) & held:
                return "added"
            case ast.Assign(targets=[target], value=value) if _own(target) and names_in(value) & held:
                if isinstance(target, ast.Subscript):
                    return "listed"
                return "added" if any(dotted(item) == dotted(target) for item in _attributes(value)) else ""
            case ast.Call(func=ast.Attribute(value=kept, attr=attr)) if attr in _LISTS and _own(kept):
                return "listed" if any(names_in(value) & held for value in node.args) else ""
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=attr), args=args) if deep < _DEEP:
                method = self._instances.classes.method(cls, attr)
                if method is not None and any(names_in(value) & held for value in args):
                    return self._way(method[0].file.function_info(method[1]), deep + 1)
        return ""


def _own(node: ast.expr) -> bool:
    """``self.x``, or a part of it."""
    attribute = False
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        attribute, node = isinstance(node, ast.Attribute), node.value
    return attribute and isinstance(node, ast.Name) and node.id == "self"


def _parts(given: Iterable[ast.expr]) -> Iterator[ast.expr]:
    """What is given, of dicts their values."""
    for value in given:
        yield from (part for part in value.values) if isinstance(value, ast.Dict) else [value]


def _attributes(node: ast.expr) -> Iterator[ast.Attribute]:
    yield from (item for item in walk(node) if isinstance(item, ast.Attribute))


def takes(function: Function, call: ast.Call) -> bool:
    """Whether a function or method takes as many arguments as a call gives."""
    arguments = function.args
    bound = bool(arguments.args) and arguments.args[0].arg in {"self", "cls"}
    count, most = len(call.args) + len(call.keywords), len(arguments.args) + len(arguments.kwonlyargs) - bound
    return arguments.vararg is not None or most - len(arguments.defaults) <= count <= most
