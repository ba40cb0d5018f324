"""What the members of a list of modules are, and where classes get such lists: the values."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

from rewriter.analyze.read.classes import Classes, is_container
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo, Resolved
from rewriter.analyze.read.nodes import Function, walk
from rewriter.analyze.read.project import Project

Form = Literal[
    "list", "comprehension", "empty", "variable", "helper", "repeated", "kept", "named", "given", "attribute", "other"
]
FROM_ELSEWHERE = {"helper", "other", "given", "attribute"}
"""Forms of lists whose members are made where they cannot be edited."""
ElementKind = Literal["block", "wrapped", "leaf", "container", "external", "unknown", "shared", "none"]
BLOCK_WRAPPERS = {
    "bmtrain.CheckpointBlock",
    "bmtrain.Block",
    "bmtrain.block_layer.CheckpointBlock",
    "bmtrain.block.Block",
}
BLOCK_LIST = "bmtrain.TransformerBlockList"
BLOCK_LISTS = {BLOCK_LIST, "bmtrain.PipelineTransformerBlockList"}
KEPT = "kept"
"""``Build.container`` of a dict, or of a class of its own, that stays what it is while its members become blocks."""
_MODULE = "torch.nn.Module"
_BARE = ({_MODULE}, {"bmtrain.DistributedModule"})
_TORCH_BLOCKS = {"TransformerEncoderLayer", "TransformerDecoderLayer"}


@dataclass(frozen=True, eq=False)
class Element:
    """One expression that yields members of a list, and what it yields. A Sequential is a block: it can be called."""

    node: ast.expr
    kind: ElementKind
    cls: ClassInfo | None = None
    file: File | None = None  # where it is written, if not where the list is


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
        if self.container == KEPT:
            return bool(self.elements) and all(element.kind == "wrapped" for element in self.elements)
        return self.container in BLOCK_LISTS


class Elements:
    """Finds out what an expression that yields a member of a list makes."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.project = classes.project

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
                return Element(node, self._leaf_kind(found), found)
            if self.classes.method(found, "forward") is None and self.classes.external_bases(found) in _BARE:
                return Element(node, "container", found)  # parts under one name
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
        if name == "torch.nn.Sequential":
            return Element(node, "block" if node.args else "unknown")
        if is_container(name) or name == _MODULE:
            return Element(node, "container")
        if name.startswith("torch."):
            return Element(node, "block" if name.split(".")[-1] in _TORCH_BLOCKS else "leaf")
        return Element(node, "external")

    def _returned(self, node: ast.Call, function: FunctionInfo) -> Element:
        """The element that a factory function of the project returns, if it returns one class."""
        for statement in walk(function.node):
            if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call):
                found = self.project.resolve(function.file, statement.value.func)
                if isinstance(found, ClassInfo) and self.classes.is_module(found):
                    leaf = self.classes.kind(found) == "leaf"
                    return Element(node, self._leaf_kind(found) if leaf else "block", found)
                if isinstance(found, External) and found.name.startswith("torch."):
                    return Element(node, self._external_element(function.file, statement.value, found.name).kind)
        return Element(node, "unknown")

    def _leaf_kind(self, info: ClassInfo) -> ElementKind:
        """What a subclass of a torch layer or container is: a container that can be called is a block."""
        bases = self.classes.external_bases(info)
        if any(base.split(".")[-1] in {"Sequential", *_TORCH_BLOCKS} for base in bases):
            return "block"
        if any(is_container(base) for base in bases):
            return "block" if self.classes.method(info, "forward") else "container"
        return "leaf"


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


def dict_values(node: ast.expr) -> list[ast.expr]:
    """Values of a dict display."""
    if isinstance(node, ast.DictComp):
        return [node.value]
    return list(node.values) if isinstance(node, ast.Dict) else []


def returned_class(project: Project, file: File, function: Function) -> Resolved:
    """The class of what a function returns, if it returns a new object."""
    for node in walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            return project.resolve(file, node.value.func)
    return None


def returns_list(project: Project, file: File, function: Function) -> bool:
    """Whether a function always returns a new ModuleList, perhaps under a name."""
    local = {
        node.targets[0].id: node.value
        for node in walk(function)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    }
    returned = [node.value for node in walk(function) if isinstance(node, ast.Return) and node.value is not None]
    values = [local.get(value.id, value) if isinstance(value, ast.Name) else value for value in returned]
    return bool(values) and all(
        isinstance(value, ast.Call) and project.external(file, value.func) == "torch.nn.ModuleList" for value in values
    )
