"""Lists of modules that a class does not make itself: given to its constructor, or returned among other things."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rewriter.analyze.model.elements import BLOCK_LISTS, Build, Element, ElementKind, Function, self_path
from rewriter.analyze.model.loops import Loop, find_loops
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, File
from rewriter.analyze.read.names import walk

if TYPE_CHECKING:
    from rewriter.analyze.model.containers import Containers, FunctionScan

LIST = "torch.nn.ModuleList"
TORCH_STACKS = {"torch.nn.TransformerEncoder", "torch.nn.TransformerDecoder"}  # each has a ModuleList ``layers``
_DEPTH = 3


class Loops(dict[ClassInfo, list[Loop]]):
    """The loops of classes, found when first asked for."""

    def __missing__(self, info: ClassInfo) -> list[Loop]:
        self[info] = list(find_loops(info))
        return self[info]


@dataclass(frozen=True)
class Caller:
    """A call that makes an object of a class, and the function around it."""

    file: File
    function: Function | None
    owner: ClassInfo | None
    call: ast.Call
    method: bool = False

    def argument(self, function: Function, name: str) -> ast.expr | None:
        """What the call gives an argument of a constructor; None if that is not to be seen."""
        for keyword in self.call.keywords:
            if keyword.arg == name:
                return keyword.value
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        place = names.index(name) - (not self.method) if name in names else -1
        before = self.call.args[: place + 1]
        if place < 0 or len(before) <= place or any(isinstance(value, ast.Starred) for value in before):
            return None
        return before[place]


def callers(classes: Classes, owner: ClassInfo) -> Iterator[Caller]:
    """Every call in the project that runs the constructor of a class, subclasses' included."""
    below = [info for info in classes.descendants(owner) if _constructor(classes, info) is owner]
    takers = {owner, *(info for info in below if "__init__" not in info.methods)}
    for file in classes.project:
        if any(file.mentions(taker.name) for taker in takers):
            for call in file.calls:
                if classes.project.resolve(file, call.func) in takers:
                    yield _caller(file, call)
    for info in (owner, *classes.descendants(owner)):
        for name, function in info.methods.items():
            own = function.args.args[0].arg if function.args.args else ""
            for call in (node for node in walk(function) if isinstance(node, ast.Call)):
                if isinstance(call.func, ast.Name) and call.func.id == own and own != "self" and info in takers:
                    yield Caller(info.file, function, info, call)  # cls(...)
                elif name == "__init__" and _is_base_call(classes, info, owner, call):
                    by_name = isinstance(call.func, ast.Attribute) and not isinstance(call.func.value, ast.Call)
                    yield Caller(info.file, function, info, call, by_name)


def _constructor(classes: Classes, info: ClassInfo) -> ClassInfo | None:
    found = classes.method(info, "__init__")
    return found[0] if found else None


def _is_base_call(classes: Classes, info: ClassInfo, owner: ClassInfo, call: ast.Call) -> bool:
    """Whether this is ``super().__init__(...)`` or ``Owner.__init__(self, ...)`` in a class below the owner."""
    func = call.func
    if info is owner or not isinstance(func, ast.Attribute) or func.attr != "__init__":
        return False
    if isinstance(func.value, ast.Call) and isinstance(func.value.func, ast.Name) and func.value.func.id == "super":
        return next((base for base in classes.ancestors(info) if "__init__" in base.methods), None) is owner
    return classes.project.resolve(info.file, func.value) is owner


def _caller(file: File, call: ast.Call) -> Caller:
    around = list(file.names.ancestors(call))
    place = next((i for i, node in enumerate(around) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))), -1)
    if place < 0:
        return Caller(file, None, None, call)
    function, outside = around[place], around[place + 1]
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    owner = file.class_info(outside) if isinstance(outside, ast.ClassDef) else None
    return Caller(file, function, owner, call)


def required(function: Function, name: str) -> bool:
    """Whether a function has to be given an argument, and not None."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    with_default = arguments[len(arguments) - len(function.args.defaults) :] if function.args.defaults else []
    only = [argument for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            if default is None]  # fmt: skip
    found = next((a for a in (*arguments, *only) if a.arg == name), None)
    if found is None or found in with_default:
        return False
    parts = list(walk(found.annotation)) if found.annotation else []
    return not any(
        getattr(node, "id", getattr(node, "attr", "")) == "Optional"
        or (isinstance(node, ast.Constant) and node.value is None)
        for node in parts
    )


def members(builds: list[Build], line: int = 0) -> list[Element] | None:
    """The members of a value that is certainly a ModuleList, complete before ``line``, each with its file."""
    if not builds or any(build.container not in {LIST, "helper"} for build in builds):
        return None
    if line and any(getattr(append, "lineno", 0) >= line for build in builds for append in build.appends):
        return None
    return [replace(element, file=element.file or build.file) for build in builds for element in build.elements]


def is_looped(scan: FunctionScan, path: str) -> bool:
    """Whether a loop runs over an attribute, or ran over it before it was converted."""
    return (
        not path
        or any(loop.path == path for loop in scan.containers.loops[scan.owner])
        or any(
            isinstance(node, ast.Assign)
            and self_path(node.targets[0], scan.me) == path
            and scan.project.external(scan.file, getattr(node.value, "func", node.value)) in BLOCK_LISTS
            for node in walk(scan.function)
        )
    )


def attributes(containers: Containers, info: ClassInfo, path: str) -> set[ElementKind]:
    """What the members of a plain list of other attributes are, ``self.layers = [self.fc1, self.fc2]``."""
    assigned = {
        self_path(node.targets[0], "self"): node.value
        for node in walk(info.methods.get("__init__", ast.Pass()))
        if isinstance(node, ast.Assign)
    }
    held = assigned.get(path)
    made = [assigned.get(self_path(item, "self")) for item in held.elts] if isinstance(held, ast.List) else []
    return {containers.element(info.file, value).kind if value is not None else "unknown" for value in made}


def given(scan: FunctionScan, name: str) -> list[Element] | None:
    """Members of the list that a constructor is given, where all who make objects of its class give it a ModuleList."""
    function, classes = scan.function, scan.containers.classes
    if (
        not scan.is_given(name)
        or scan.depth > _DEPTH
        or function.name != "__init__"
        or classes.project.partial
        or not required(function, name)
    ):
        return None
    made = [list(scan.container("", value)) for value in scan.assigned.get(name, [])]
    if any(members(builds) is None for builds in made):
        return None
    found: list[Element] | None = None
    for caller in callers(classes, scan.owner):
        value = caller.argument(function, name)
        if value is None or caller.function is None:
            return None
        there = scan.elsewhere(caller.owner or scan.owner, caller.function, caller.file, caller.owner is not None)
        elements = members(list(there.container("", value)), caller.call.lineno)
        if elements is None:
            return None
        found = [*(found or []), *elements]
    return found


def returned(scan: FunctionScan, call: ast.Call, place: int, count: int) -> list[Element] | None:
    """Members of the ModuleList that a function of the project returns at one place of its tuples of ``count``."""
    function = scan.called(call)
    if function is None:
        return None
    owner, info = function
    found: list[Element] | None = None
    for node in walk(info.node):
        if isinstance(node, ast.Return) and node.value is not None:
            if not isinstance(node.value, ast.Tuple) or len(node.value.elts) != count:
                return None
            there = scan.elsewhere(owner or scan.owner, info.node, info.file, owner is not None)
            elements = members(list(there.container("", node.value.elts[place])))
            if elements is None:
                return None
            found = [*(found or []), *elements]
    return found
