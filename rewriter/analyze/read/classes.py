"""The class graph: which classes are torch modules, and by which base."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.analyze.read.project import Project

Kind = Literal["module", "leaf", "distributed", "external", "none"]

_CONTAINERS = {"torch.nn.ModuleList", "torch.nn.ModuleDict", "torch.nn.Sequential", "torch.nn.ParameterList"}
# Bases in well-known libraries that are torch modules.
_KNOWN = {
    "PreTrainedModel", "GradientCheckpointingLayer", "LightningModule", "BaseModule", "BaseModel", "ModelMixin",
    "FairseqEncoder", "FairseqDecoder", "ModuleUtilsMixin", "MegatronModule", "PyTorchModelHubMixin",
}  # fmt: skip


class Classes:
    """Answers about classes, remembered."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.kind = lru_cache(maxsize=None)(self._kind)
        self.ancestors = lru_cache(maxsize=None)(self._ancestors)
        self.descendants = lru_cache(maxsize=None)(self._descendants)

    def bases(self, info: ClassInfo) -> Iterator[tuple[ast.expr, ClassInfo | External | None]]:
        for base in info.node.bases:
            found = self.project.resolve(info.file, base)
            yield base, found if isinstance(found, (ClassInfo, External)) else None

    def _ancestors(self, info: ClassInfo) -> tuple[ClassInfo, ...]:
        """Project classes above this one, nearest first, without repetition."""
        found: dict[ClassInfo, None] = {}
        queue = [info]
        while queue:
            for _, base in self.bases(queue.pop(0)):
                if isinstance(base, ClassInfo) and base is not info and base not in found:
                    found[base] = None
                    queue.append(base)
        return tuple(found)

    def _descendants(self, info: ClassInfo) -> tuple[ClassInfo, ...]:
        """Project classes below this one."""
        found: dict[ClassInfo, None] = {}
        queue = [info]
        while queue:
            current = queue.pop()
            for file in self.project.with_base(current.name):
                for below in self.all(file):
                    if (
                        below not in found
                        and below is not info
                        and any(base is current for _, base in self.bases(below))
                    ):
                        found[below] = None
                        queue.append(below)
        return tuple(found)

    def _kind(self, info: ClassInfo) -> Kind:
        """How a class becomes a torch module: by nn.Module, a torch leaf or container, bmtrain, or a library's base."""
        kinds = {external_kind(name) for name in self.external_bases(info)}
        order: tuple[Kind, ...] = ("leaf", "external", "distributed", "module")
        return next((kind for kind in order if kind in kinds), "none")

    def external_bases(self, info: ClassInfo) -> set[str]:
        """Names of the classes outside the project that a class derives from."""
        return {
            base.name
            for member in (info, *self.ancestors(info))
            for _, base in self.bases(member)
            if isinstance(base, External)
        }

    def is_module(self, info: ClassInfo) -> bool:
        return self.kind(info) != "none"

    def method(self, info: ClassInfo, name: str) -> tuple[ClassInfo, ast.FunctionDef | ast.AsyncFunctionDef] | None:
        """The method a call reaches, in the class or the nearest project base."""
        for member in (info, *self.ancestors(info)):
            if name in member.methods:
                return member, member.methods[name]
        return None

    def all(self, file: File) -> Iterator[ClassInfo]:
        for node in file.class_nodes:
            yield file.class_info(node)


def external_kind(name: str) -> Kind:
    if name == "torch.nn.Module":
        return "module"
    if name.startswith("bmtrain."):
        last = name.split(".")[-1]
        if last in {"DistributedModule", "Block", "CheckpointBlock"}:
            return "distributed"
        return "leaf" if last[:1].isupper() else "none"
    if name.startswith("torch.nn.") and name.count(".") == 2 and name[9:10].isupper():
        return "none" if name in {"torch.nn.Parameter"} else "leaf"
    if name.startswith("torch.jit.ScriptModule"):
        return "external"
    return "external" if name.split(".")[-1] in _KNOWN or is_hub_base(name) else "none"


def is_hub_base(name: str) -> bool:
    """Whether this is a base class of models that transformers or diffusers offers."""
    package, last = name.split(".")[0], name.split(".")[-1]
    return package in ("transformers", "diffusers") and (last.endswith("PreTrainedModel") or last == "ModelMixin")


def is_container(name: str) -> bool:
    return name in _CONTAINERS
