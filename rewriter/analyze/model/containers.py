"""Which attributes hold lists of modules, how the lists are built and of what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace

from rewriter.analyze.model.callers import callers, required
from rewriter.analyze.model.elements import (
    BLOCK_LIST,
    BLOCK_LISTS,
    BLOCK_WRAPPERS,
    KEPT,
    Build,
    Element,
    ElementKind,
    Elements,
    Form,
    appended,
    dict_values,
    returned_class,
    returns_list,
)
from rewriter.analyze.model.locals import Locals
from rewriter.analyze.model.loops import Loops
from rewriter.analyze.read.classes import Classes, is_container
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo, Resolved
from rewriter.analyze.read.nodes import Function, dotted, self_path, walk

LIST = "torch.nn.ModuleList"
_TORCH_STACKS = {"torch.nn.TransformerEncoder", "torch.nn.TransformerDecoder"}  # each has a ModuleList ``layers``
_DEPTH = 3
"""How many calls a list is followed through to the place that makes it."""


class Containers:
    """Finds the containers of every class of a file."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.project = classes.project
        self.element = Elements(classes).element
        self.loops = Loops()
        self._cache: dict[ClassInfo, dict[str, list[Build]]] = {}
        self._others: dict[ClassInfo, set[str]] = {}

    def of(self, info: ClassInfo) -> dict[str, list[Build]]:
        """Path -> builds, in source order."""
        if info not in self._cache:
            found: dict[str, list[Build]] = {}
            self._others[info] = set()
            for function in info.methods.values():
                for build in FunctionScan(self, info, function).builds():
                    found.setdefault(build.path, []).append(build)
            for path, builds in found.items():  # an attribute is replaced only once
                if any(build.is_stack_already for build in builds):
                    found[path] = [replace(b, container=BLOCK_LIST) if b.form == "attribute" else b for b in builds]
            self._cache[info] = found
        return self._cache[info]

    def other_assignments(self, info: ClassInfo) -> set[str]:
        """Paths that the class also gives something else than a container or None."""
        self.of(info)
        return self._others[info]

    def kinds_of_attributes(self, info: ClassInfo, path: str) -> set[ElementKind]:
        """What the members of a plain list of other attributes are, ``self.layers = [self.fc1, self.fc2]``."""
        assigned = {
            self_path(node.targets[0], "self"): node.value
            for node in walk(info.methods.get("__init__", ast.Pass()))
            if isinstance(node, ast.Assign)
        }
        held = assigned.get(path)
        made = [assigned.get(self_path(item, "self")) for item in held.elts] if isinstance(held, ast.List) else []
        return {self.element(info.file, value).kind if value is not None else "unknown" for value in made}

    def note_other(self, info: ClassInfo, path: str) -> None:
        self._others[info].add(path)


class FunctionScan(Locals):
    """Containers that one method builds."""

    def __init__(
        self,
        containers: Containers,
        owner: ClassInfo,
        function: Function,
        file: File | None = None,
        method: bool = True,
        depth: int = 0,
    ) -> None:
        super().__init__(file or owner.file, function, method)
        self.containers = containers
        self.project = containers.project
        self.owner = owner
        self.depth = depth

    def builds(self) -> Iterator[Build]:
        for node in walk(self.function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    yield from self._assigned(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                yield from self._assigned(node.target, node.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield from self._registered(node, node.func)
            elif isinstance(node, ast.For):
                self._unknown(node.target)
            elif isinstance(node, ast.Call) and dotted(node.func) == "setattr" and len(node.args) == 3:
                self._unknown(ast.Attribute(node.args[0], str(getattr(node.args[1], "value", "")), ast.Store()))

    def _assigned(self, target: ast.expr, value: ast.expr) -> Iterator[Build]:
        path = self_path(target, self.me)
        if isinstance(target, (ast.Tuple, ast.List)):
            yield from self._unpacked(target.elts, value)
        elif path:
            yield from self.container(path, value)
            for side in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                part_of_itself = isinstance(side, ast.Subscript) and self_path(side.value, self.me) == path
                if not (part_of_itself or (isinstance(side, ast.Constant) and side.value is None)):
                    if not any(True for _ in self.container(path, side)):
                        self._unknown(target)

    def _unknown(self, target: ast.expr) -> None:
        """Note that attributes get something that is not seen to be a container."""
        for node in walk(target):
            path = self_path(node, self.me)
            if path:
                self.containers.note_other(self.owner, path)

    def _unpacked(self, targets: list[ast.expr], value: ast.expr) -> Iterator[Build]:
        """``self.up, self.down = self._make()``."""
        for place, target in enumerate(targets):
            path = self_path(target, self.me)
            if path and isinstance(value, ast.Call) and self._is_looped(path):
                elements = self._returned(value, place, len(targets))
                if elements is not None:
                    yield self._build(path, value, "attribute", elements)
                    continue
            self._unknown(target)

    def _build(self, path: str, value: ast.expr, form: Form, elements: list[Element]) -> Build:
        return Build(self.file, self.owner, self.function, path, value, LIST, form, tuple(elements))

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
            local = self.value_of(value)
            if self.is_given(value.id):
                elements = self._given(value.id) if self._is_looped(path) else None
                if elements is not None:
                    yield self._build(path, value, "given", elements)
            elif isinstance(local, ast.Call):
                yield from self._call(path, local, value.id)
        elif isinstance(value, ast.Call):
            yield from self._call(path, value, "")

    def _call(self, path: str, call: ast.Call, local: str) -> Iterator[Build]:
        name = self.project.external(self.file, call.func)
        if name == "torch.nn.ModuleDict":
            yield from self._mapping(path, call)
            yield from self._kept(path, call, local)
        elif name in {"torch.nn.ModuleList", "torch.nn.Sequential"} or name in BLOCK_LISTS:
            appends = tuple(self.appends(path, local))
            form, nodes = self._form(call, name)
            nodes += [node for append in appends for node in appended(append)]
            elements = [self._element(node) for node in nodes]
            if (
                name in BLOCK_LISTS
                and call.args
                and isinstance(call.args[0], ast.Name)
                and self.is_given(call.args[0].id)
            ):
                elements += self._given(call.args[0].id) or ()
            yield Build(self.file, self.owner, self.function, path, call, name, form, tuple(elements), appends)
        elif name in _TORCH_STACKS and path:
            yield self._build(f"{path}.layers", call, "attribute", [Element(call, "block")])
        elif self._returns_list(call):
            yield Build(self.file, self.owner, self.function, path, call, "helper", "helper", ())
        else:
            yield from self._kept(path, call, local)

    def _kept(self, path: str, call: ast.Call, local: str) -> Iterator[Build]:
        """A ModuleDict, a container class of the project, or a helper that fills one: only its members matter."""
        found = self.project.resolve(self.file, call.func)
        nodes: list[ast.expr] = []
        appends: tuple[ast.AST, ...] = ()
        if isinstance(found, FunctionInfo):
            made = returned_class(self.project, found.file, found.node)
            if made is not None and self._is_container(made):
                nodes = [argument.body for argument in call.args if isinstance(argument, ast.Lambda)]
        elif found is not None and self._is_container(found):
            appends = tuple(self.appends(path, local))
            for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
                inner = value.value if isinstance(value, ast.Starred) else value
                nodes += dict_values(inner) or (self._list_form(inner)[1] if not isinstance(inner, ast.Call) else [])
            nodes += [node for append in appends for node in appended(append)]
            nodes += self.stored_by_key(path, local)
        nodes = [node for node in nodes if isinstance(node, (ast.Call, ast.Name, ast.Subscript, ast.IfExp))]
        if nodes:
            elements = tuple(self._element(node) for node in nodes)
            yield Build(self.file, self.owner, self.function, path, call, KEPT, "kept", elements, appends)

    def _is_container(self, found: Resolved) -> bool:
        if isinstance(found, ClassInfo):
            return any(is_container(base) for base in self.containers.classes.external_bases(found))
        return isinstance(found, External) and found.name == "torch.nn.ModuleDict"

    def _element(self, node: ast.expr) -> Element:
        """A member, looked up if it is a local variable that is made anew each time it is added."""
        if isinstance(node, ast.Call) and node.args and self.project.external(self.file, node.func) in BLOCK_WRAPPERS:
            return Element(node, "wrapped", self._element(node.args[0]).cls)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.defaults:
            cls = self.project.resolve(self.file, self.defaults[node.func.id])
            return Element(node, "unknown", cls if isinstance(cls, ClassInfo) else None)
        values = self.assigned.get(node.id, []) if isinstance(node, ast.Name) else []
        made = values and all(isinstance(value, (ast.Call, ast.IfExp)) for value in values)
        if not isinstance(node, ast.Name) or not made:
            return self.containers.element(self.file, node)
        if not self.made_anew(node):
            return Element(node, "shared")
        found = [self.containers.element(self.file, value) for value in values]
        kinds = {element.kind for element in found}
        cls = next((element.cls for element in found if element.cls is not None), None)
        return Element(node, found[0].kind if len(kinds) == 1 else "unknown", cls)

    def _returns_list(self, call: ast.Call) -> bool:
        """Whether a call reaches a helper that returns a ModuleList (``_get_clones(...)``, ``self._make()``)."""
        found = self._called(call)
        return found is not None and returns_list(self.project, found[1].file, found[1].node)

    def _called(self, call: ast.Call) -> tuple[ClassInfo | None, FunctionInfo] | None:
        """The function of the project that a call reaches, or the method of this class, with its class."""
        found = self.project.resolve(self.file, call.func)
        if isinstance(found, FunctionInfo):
            return None, found
        func = call.func
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == self.me:
            method = self.containers.classes.method(self.owner, func.attr)
            return (method[0], FunctionInfo(method[0].file, method[1])) if method else None
        return None

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
            if len(arguments) == 1 and not isinstance(arguments[0], ast.Starred):
                return "named", arguments  # one dict of names, which are the keys
            if len(arguments) != 1:
                return ("empty", []) if not arguments else ("other", arguments)
            assert isinstance(arguments[0], ast.Starred)
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
            starred = [self._list_form(item.value) for item in value.elts if isinstance(item, ast.Starred)]
            odd = next((form for form, _ in starred if form in {"repeated", "other"}), None)
            plain = [item for item in value.elts if not isinstance(item, ast.Starred)]
            return odd or ("list" if value.elts else "empty"), [*plain, *(node for _, part in starred for node in part)]
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
            return "repeated", []
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            (left, first), (right, second) = self._list_form(value.left), self._list_form(value.right)
            odd = next((form for form in (left, right) if form in {"repeated", "other"}), None)
            return odd or "list", [*first, *second]
        if isinstance(value, ast.Name):
            return "variable", list(self._local_elements(value.id))
        if isinstance(value, ast.Call) and dotted(value.func) == "list" and len(value.args) == 1:
            return self._list_form(value.args[0])
        return "other", []

    def _local_elements(self, name: str) -> Iterator[ast.expr]:
        """Members of a local list that becomes a container."""
        for value in self.assigned.get(name, []):
            if isinstance(value, (ast.List, ast.ListComp)):
                yield from self._list_form(value)[1]
        for append in self.appends("", name):
            yield from appended(append)

    # Lists made elsewhere --------------------------------------------------------------------------------------

    def _is_looped(self, path: str) -> bool:
        """Whether a loop runs over an attribute, or ran over it before it was converted."""
        return (
            not path
            or any(loop.path == path for loop in self.containers.loops[self.owner])
            or (
                b"BlockList" in self.file.source.data
                and any(
                    isinstance(node, ast.Assign)
                    and self_path(node.targets[0], self.me) == path
                    and self.project.external(self.file, getattr(node.value, "func", node.value)) in BLOCK_LISTS
                    for node in walk(self.function)
                )
            )
        )

    def _given(self, name: str) -> list[Element] | None:
        """Members of the list that a constructor is given, where all who make such objects give a ModuleList."""
        function, classes = self.function, self.containers.classes
        if (
            not self.is_given(name)
            or self.depth > _DEPTH
            or function.name != "__init__"
            or classes.project.partial
            or not required(function, name)
        ):
            return None
        made = [list(self.container("", value)) for value in self.assigned.get(name, [])]
        if any(_members(builds) is None for builds in made):
            return None
        found: list[Element] | None = None
        for caller in callers(classes, self.owner):
            value = caller.argument(function, name)
            if value is None or caller.function is None:
                return None
            there = self._elsewhere(caller.owner or self.owner, caller.function, caller.file, caller.owner is not None)
            elements = _members(list(there.container("", value)), caller.call.lineno)
            if elements is None:
                return None
            found = [*(found or []), *elements]
        return found

    def _returned(self, call: ast.Call, place: int, count: int) -> list[Element] | None:
        """Members of the ModuleList that a function of the project returns at one place of its tuples of ``count``."""
        function = self._called(call)
        if function is None:
            return None
        owner, info = function
        found: list[Element] | None = None
        for node in walk(info.node):
            if isinstance(node, ast.Return) and node.value is not None:
                if not isinstance(node.value, ast.Tuple) or len(node.value.elts) != count:
                    return None
                there = self._elsewhere(owner or self.owner, info.node, info.file, owner is not None)
                elements = _members(list(there.container("", node.value.elts[place])))
                if elements is None:
                    return None
                found = [*(found or []), *elements]
        return found

    def _elsewhere(self, owner: ClassInfo, function: Function, file: File, method: bool) -> FunctionScan:
        """The same for another function, which makes a list that comes here."""
        return FunctionScan(self.containers, owner, function, file, method, self.depth + 1)


def _members(builds: list[Build], line: int = 0) -> list[Element] | None:
    """The members of a value that is certainly a ModuleList, complete before ``line``, each with its file."""
    if not builds or any(build.container not in {LIST, "helper"} for build in builds):
        return None
    if line and any(getattr(append, "lineno", 0) >= line for build in builds for append in build.appends):
        return None
    return [replace(element, file=element.file or build.file) for build in builds for element in build.elements]
