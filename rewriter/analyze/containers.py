"""Which attributes hold lists of modules, how the lists are built and of what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rewriter.analyze.classes import Classes, is_container
from rewriter.analyze.names import dotted, walk
from rewriter.analyze.project import ClassInfo, External, File, FunctionInfo

Form = Literal["list", "comprehension", "empty", "variable", "helper", "repeated", "other"]
ElementKind = Literal["block", "wrapped", "leaf", "container", "external", "unknown", "shared", "none"]
Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCK_WRAPPERS = {
    "bmtrain.CheckpointBlock",
    "bmtrain.Block",
    "bmtrain.block_layer.CheckpointBlock",
    "bmtrain.block.Block",
}
BLOCK_LISTS = {"bmtrain.TransformerBlockList", "bmtrain.PipelineTransformerBlockList"}
_TORCH_BLOCKS = {"TransformerEncoderLayer", "TransformerDecoderLayer"}


@dataclass(frozen=True, eq=False)
class Element:
    """One expression that yields members of a list, and what it yields."""

    node: ast.expr
    kind: ElementKind
    cls: ClassInfo | None = None


@dataclass(frozen=True, eq=False)
class Build:
    """One place that gives ``self.<path>`` a container."""

    file: File
    owner: ClassInfo
    function: Function
    path: str
    call: ast.expr
    container: str
    form: Form
    elements: tuple[Element, ...]
    appends: tuple[ast.AST, ...] = ()

    @property
    def is_stack_already(self) -> bool:
        return self.container in BLOCK_LISTS


class Containers:
    """Finds the containers of every class of a file."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.project = classes.project
        self._cache: dict[ClassInfo, dict[str, list[Build]]] = {}
        self._others: dict[ClassInfo, set[str]] = {}

    def of(self, info: ClassInfo) -> dict[str, list[Build]]:
        """Path -> builds, in source order."""
        if info not in self._cache:
            found: dict[str, list[Build]] = {}
            self._others[info] = set()
            for function in info.methods.values():
                for build in _FunctionScan(self, info, function).builds():
                    found.setdefault(build.path, []).append(build)
            self._cache[info] = found
        return self._cache[info]

    def other_assignments(self, info: ClassInfo) -> set[str]:
        """Paths that the class also gives something else than a container or None."""
        self.of(info)
        return self._others[info]

    def note_other(self, info: ClassInfo, path: str) -> None:
        self._others[info].add(path)

    def element(self, file: File, node: ast.expr) -> Element:
        """What one member expression of a list yields."""
        if isinstance(node, ast.IfExp):
            options = [self.element(file, node.body), self.element(file, node.orelse)]
            first = options[0]
            same = all(option.kind == first.kind for option in options)
            return Element(node, first.kind if same else "unknown", first.cls if same else None)
        if isinstance(node, ast.Constant):
            return Element(node, "none")
        if not isinstance(node, ast.Call):
            return Element(node, "shared" if isinstance(node, (ast.Name, ast.Attribute)) else "unknown")
        found = self.project.resolve(file, node.func)
        if isinstance(found, ClassInfo):
            kind = self.classes.kind(found)
            if kind == "leaf":
                return Element(node, "container" if self._is_plain_container(found) else "leaf", found)
            return Element(node, "unknown" if kind == "none" else "block", found)
        if isinstance(found, External):
            return self._external_element(file, node, found.name)
        if isinstance(found, FunctionInfo):
            return self._returned(node, found)
        return Element(node, "unknown")

    def _external_element(self, file: File, node: ast.Call, name: str) -> Element:
        if name in BLOCK_WRAPPERS:
            inner = self.element(file, node.args[0]) if node.args else None
            return Element(node, "wrapped", inner.cls if inner else None)
        if name in {"copy.deepcopy", "deepcopy"}:
            return Element(node, "unknown")
        if name.startswith("torch."):
            last = name.split(".")[-1]
            if is_container(name):
                return Element(node, "container")
            return Element(node, "block" if last in _TORCH_BLOCKS else "leaf")
        return Element(node, "external")

    def _returned(self, node: ast.Call, function: FunctionInfo) -> Element:
        """The element that a factory function of the project returns, if it returns one class."""
        for statement in walk(function.node):
            if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call):
                found = self.project.resolve(function.file, statement.value.func)
                if isinstance(found, ClassInfo) and self.classes.is_module(found):
                    return Element(node, "leaf" if self.classes.kind(found) == "leaf" else "block", found)
                if isinstance(found, External) and found.name.startswith("torch."):
                    return Element(node, "container" if is_container(found.name) else "leaf")
        return Element(node, "unknown")

    def _is_plain_container(self, info: ClassInfo) -> bool:
        for member in (info, *self.classes.ancestors(info)):
            for _, base in self.classes.bases(member):
                if isinstance(base, External) and is_container(base.name):
                    return True
        return False


class _FunctionScan:
    """Containers that one method builds."""

    def __init__(self, containers: Containers, owner: ClassInfo, function: Function) -> None:
        self.containers = containers
        self.project = containers.project
        self.owner = owner
        self.file = owner.file
        self.function = function
        arguments = [*function.args.posonlyargs, *function.args.args]
        self.me = arguments[0].arg if arguments else ""

    def builds(self) -> Iterator[Build]:
        for node in walk(self.function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    yield from self._assigned(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                yield from self._assigned(node.target, node.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield from self._registered(node, node.func)

    def _assigned(self, target: ast.expr, value: ast.expr) -> Iterator[Build]:
        path = self_path(target, self.me)
        if path:
            found = list(self.container(path, value))
            yield from found
            part_of_itself = isinstance(value, ast.Subscript) and self_path(value.value, self.me) == path
            if not found and not part_of_itself and not (isinstance(value, ast.Constant) and value.value is None):
                self.containers.note_other(self.owner, path)

    def _registered(self, node: ast.Call, func: ast.Attribute) -> Iterator[Build]:
        """``self.add_module("layers", ...)`` and ``self.parts.update({"layers": ...})``."""
        if func.attr in {"add_module", "register_module"} and len(node.args) == 2:
            if isinstance(func.value, ast.Name) and func.value.id == self.me and isinstance(node.args[0], ast.Constant):
                yield from self.container(str(node.args[0].value), node.args[1])
        elif func.attr == "update" and len(node.args) == 1 and isinstance(node.args[0], ast.Dict):
            path = self_path(func.value, self.me)
            if path:
                yield from self._mapping(path, node.args[0])

    def container(self, path: str, value: ast.expr) -> Iterator[Build]:
        """Builds of ``self.<path> = value``."""
        if isinstance(value, ast.IfExp):
            yield from self.container(path, value.body)
            yield from self.container(path, value.orelse)
        elif isinstance(value, ast.Name):
            local = self._locals.get(value.id, [])
            if len(local) == 1 and isinstance(local[0], ast.Call):
                yield from self._call(path, local[0], value.id)
        elif isinstance(value, ast.Call):
            yield from self._call(path, value, "")

    def _call(self, path: str, call: ast.Call, local: str) -> Iterator[Build]:
        name = self.project.external(self.file, call.func)
        if name == "torch.nn.ModuleDict":
            yield from self._mapping(path, call)
        elif name in {"torch.nn.ModuleList", "torch.nn.Sequential"} or name in BLOCK_LISTS:
            appends = tuple(self._appends(path, local))
            form, nodes = self._form(call, name)
            nodes += [node for append in appends for node in appended(append)]
            elements = tuple(self._element(node) for node in nodes)
            yield Build(self.file, self.owner, self.function, path, call, name, form, elements, appends)
        elif self._returns_list(call):
            yield Build(self.file, self.owner, self.function, path, call, "helper", "helper", ())

    def _element(self, node: ast.expr) -> Element:
        """A member, looked up if it is a local variable that is made anew each time it is added."""
        values = self._locals.get(node.id, []) if isinstance(node, ast.Name) else []
        if not values or not all(isinstance(value, (ast.Call, ast.IfExp)) for value in values):
            return self.containers.element(self.file, node)
        assert isinstance(node, ast.Name)
        if not self._made_anew(node):
            return Element(node, "shared")
        found = [self.containers.element(self.file, value) for value in values]
        kinds = {element.kind for element in found}
        cls = next((element.cls for element in found if element.cls is not None), None)
        return Element(node, found[0].kind if len(kinds) == 1 else "unknown", cls)

    def _made_anew(self, node: ast.Name) -> bool:
        """Whether every loop around the use of a name assigns it too."""
        names = self.file.names
        around = [p for p in names.ancestors(node) if isinstance(p, (ast.For, ast.While, ast.ListComp, ast.GeneratorExp))]
        stored = [n for n in walk(self.function) if isinstance(n, ast.Name) and n.id == node.id and n.ctx.__class__ is ast.Store]
        for loop in around:
            if not any(loop in names.ancestors(place) for place in stored):
                return False
        return True

    def _returns_list(self, call: ast.Call) -> bool:
        """Whether a call reaches a helper of the project that returns a ModuleList (``_get_clones``)."""
        found = self.project.resolve(self.file, call.func)
        if not isinstance(found, FunctionInfo):
            return False
        for node in walk(found.node):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                return self.project.external(found.file, node.value.func) == "torch.nn.ModuleList"
        return False

    def _mapping(self, path: str, node: ast.expr) -> Iterator[Build]:
        """Containers held by name in ``nn.ModuleDict(dict(h=...))`` or ``{"h": ...}``."""
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg and keyword.arg != "modules":
                    yield from self.container(f"{path}.{keyword.arg}", keyword.value)
            for argument in node.args:
                yield from self._mapping(path, argument)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=False):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield from self.container(f"{path}.{key.value}", value)

    def _form(self, call: ast.Call, name: str) -> tuple[Form, list[ast.expr]]:
        arguments = list(call.args)
        if name == "torch.nn.Sequential":
            if len(arguments) != 1 or not isinstance(arguments[0], ast.Starred):
                return ("empty", []) if not arguments else ("other", arguments)
            arguments = [arguments[0].value]
        elif not arguments and call.keywords and call.keywords[0].arg == "modules":
            arguments = [call.keywords[0].value]
        if not arguments:
            return "empty", []
        return self._list_form(arguments[0])

    def _list_form(self, value: ast.expr) -> tuple[Form, list[ast.expr]]:
        if isinstance(value, (ast.ListComp, ast.GeneratorExp)):
            return ("repeated" if isinstance(value.elt, ast.Name) else "comprehension"), [value.elt]
        if isinstance(value, (ast.List, ast.Tuple)):
            if any(isinstance(item, ast.Starred) for item in value.elts):
                return "other", []
            return ("list" if value.elts else "empty"), list(value.elts)
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
            return "repeated", []
        if isinstance(value, ast.Name):
            return "variable", list(self._local_elements(value.id))
        if isinstance(value, ast.Call) and dotted(value.func) == "list" and len(value.args) == 1:
            return self._list_form(value.args[0])
        return "other", []

    def _local_elements(self, name: str) -> Iterator[ast.expr]:
        """Members of a local list that becomes a container."""
        for value in self._locals.get(name, []):
            if isinstance(value, (ast.List, ast.ListComp)):
                yield from self._list_form(value)[1]
        for append in self._appends("", name):
            yield from appended(append)

    @cached_property
    def _locals(self) -> dict[str, list[ast.expr]]:
        found: dict[str, list[ast.expr]] = {}
        for node in walk(self.function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, []).append(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found.setdefault(node.target.id, []).append(node.value)
        return found

    def _appends(self, path: str, local: str) -> Iterator[ast.AST]:
        for node in walk(self.function):
            receiver: ast.expr | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in {"append", "extend", "insert", "add_module"}:
                    receiver = node.func.value
            elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
                receiver = node.target
            if receiver is None:
                continue
            if (local and isinstance(receiver, ast.Name) and receiver.id == local) or (
                path and self_path(receiver, self.me) == path
            ):
                yield node


def appended(node: ast.AST) -> list[ast.expr]:
    """The member expressions of an append, insert, extend or ``+=``."""
    if isinstance(node, ast.AugAssign):
        values: list[ast.expr] = [node.value]
        many = True
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        values, many = list(node.args[-1:]), node.func.attr == "extend"
    else:
        return []
    if not many:
        return values
    found: list[ast.expr] = []
    for value in values:
        if isinstance(value, (ast.ListComp, ast.GeneratorExp)):
            found.append(value.elt)
        elif isinstance(value, (ast.List, ast.Tuple)):
            found.extend(value.elts)
        else:
            found.append(value)
    return found


def self_path(node: ast.AST, me: str) -> str:
    """``a.b`` for ``self.a.b`` and ``self.a["b"]``, else an empty string."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            if not isinstance(node.slice.value, str):
                return ""
            parts.append(node.slice.value)
            node = node.value
        else:
            break
    if not parts or not isinstance(node, ast.Name) or node.id != me or not me:
        return ""
    return ".".join(reversed(parts))
