"""What the members of a list of modules are, and where classes get such lists: the values."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

from rewriter.analyze.classes import Classes, is_container
from rewriter.analyze.names import walk
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
