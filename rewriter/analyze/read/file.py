"""One file of a project, and what a name in it may mean: a torch name, a class, a function, a module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from rewriter.analyze.read.names import Names
from rewriter.analyze.read.nodes import Function, positional
from rewriter.analyze.read.notebook import Notebook
from rewriter.analyze.read.source import Source
from rewriter.types import Conversion, InputError

_TORCH_HOMES = (
    (re.compile(r"^torch\.nn\.(?:modules|parameter)(?:\.[a-z_]+)*\.([A-Z]\w*)$"), r"torch.nn.\1"),
    (re.compile(r"^torch\.nn\.utils\.clip_grad\.(\w+)$"), r"torch.nn.utils.\1"),
    (re.compile(r"^torch\.optim\.(?!lr_scheduler|swa_utils)[a-z_]+\.([A-Z]\w*)$"), r"torch.optim.\1"),
    (re.compile(r"^torch\.(?:(?:cuda\.|cpu\.)?amp\.(?:grad_scaler\.)?)?GradScaler$"), "torch.amp.GradScaler"),
    (re.compile(r"^torch\.nn\.parallel\.distributed\.(\w+)$"), r"torch.nn.parallel.\1"),
    (
        re.compile(r"^torch\.utils\.data\.(?:dataloader|distributed|dataset|sampler)\.([A-Z]\w*)$"),
        r"torch.utils.data.\1",
    ),
    (re.compile(r"^torch\.random\.manual_seed$"), "torch.manual_seed"),
    (re.compile(r"^torch\.serialization\.(save|load)$"), r"torch.\1"),
    (re.compile(r"^torch\.distributed\.distributed_c10d\.(\w+)$"), r"torch.distributed.\1"),
)


@dataclass(frozen=True, slots=True)
class External:
    """Something outside the project, by its canonical dotted name."""

    name: str


@dataclass(frozen=True, eq=False)
class ClassInfo:
    file: File
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def methods(self) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
        return {item.name: item for item in self.node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}


@dataclass(frozen=True, eq=False)
class FunctionInfo:
    file: File
    node: Function

    @property
    def parameters(self) -> list[str]:
        """The names of those that a call's arguments without a keyword fill, without a method's ``self``."""
        listed = positional(self.node)
        method = isinstance(self.file.names.parents.get(self.node), ast.ClassDef)
        return listed[1:] if method and listed[:1] in (["self"], ["cls"]) else listed

    def given(self, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
        """The parameters, each with what a call gives for it."""
        yield from zip(self.parameters, call.args, strict=False)
        yield from ((keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg)


@dataclass(frozen=True, eq=False)
class ModuleRef:
    file: File


@dataclass(frozen=True)
class Original:
    """What a file was before it became an ordinary one, by which findings, and its bytes since."""

    source: Source
    applied: tuple[Conversion, ...]
    after: bytes


Resolved = External | ClassInfo | FunctionInfo | ModuleRef | None


@dataclass(eq=False)
class File:
    """One file. ``convert`` is False for files that are only read; ``notebook`` is where cells came from.

    ``original`` is what the file was, where it was written for another engine.
    """

    source: Source
    convert: bool = True
    notebook: Notebook | None = None
    original: Original | None = None
    rank_flags: dict[str, bool] | None = None
    rank_holders: dict[tuple[ast.AST | None, str], bool] | None = None
    given_ranks: set[tuple[ast.AST | None, str]] = field(default_factory=set)
    classes: dict[ast.ClassDef, ClassInfo] = field(default_factory=dict)
    functions: dict[ast.AST, FunctionInfo] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.source.path

    @cached_property
    def place(self) -> str:
        """The whole path, the same in every process."""
        return str(self.path.resolve())

    @cached_property
    def folder(self) -> Path:
        return self.path.resolve().parent

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; empty for a file that is only read and does not parse."""
        try:
            return self.source.tree
        except InputError:
            if self.convert:
                raise
            return ast.Module(body=[], type_ignores=[])

    def mentions(self, text: str) -> bool:
        """Whether some text is in the file at all: a cheap question before it is parsed."""
        return text.encode() in self.source.data

    @cached_property
    def names(self) -> Names:
        return Names(self.tree)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes in source order."""
        return self.names.nodes

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in self.nodes if isinstance(node, ast.Call)]

    def class_info(self, node: ast.ClassDef) -> ClassInfo:
        return self.classes.setdefault(node, ClassInfo(self, node))

    def function_info(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> FunctionInfo:
        return self.functions.setdefault(node, FunctionInfo(self, node))

    @cached_property
    def class_nodes(self) -> list[ast.ClassDef]:
        return [node for node in self.nodes if isinstance(node, ast.ClassDef)]


@lru_cache(maxsize=100_000)
def canonical(name: str) -> str:
    """The public name of a torch object reached by a private path."""
    if name.startswith("torch."):
        for pattern, target in _TORCH_HOMES:
            replaced, count = pattern.subn(target, name)
            if count:
                return replaced
    return name


_CLASS = re.compile(rb"^[ \t]*class\s+\w+\s*\(([^)]*)\)", re.M)
_LAST_NAME = re.compile(rb"(\w+)\s*(?:\[|,|$)", re.M)


def base_names(data: bytes) -> set[bytes]:
    """The names that a file's classes have as bases, without the modules in front of them."""
    return {name for bases in _CLASS.findall(data) for name in _LAST_NAME.findall(bases)}
