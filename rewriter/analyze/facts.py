"""Everything the rules ask about a project, computed when first asked."""

from __future__ import annotations

from functools import cached_property

from rewriter.analyze.classes import Classes
from rewriter.analyze.managers import Managers
from rewriter.analyze.names import Binding, Import
from rewriter.analyze.project import File, Project
from rewriter.analyze.scripts import Scripts
from rewriter.analyze.stacks import Stacks


class Facts:
    """``blocks`` holds patterns such as ``GPT.h`` that name stacks."""

    def __init__(self, project: Project, blocks: tuple[str, ...] = ()) -> None:
        self.project = project
        self.classes = Classes(project)
        self.blocks = blocks
        self._managers: dict[File, Managers] = {}

    @cached_property
    def stacks(self) -> Stacks:
        return Stacks(self.project, self.classes, self.blocks)

    @cached_property
    def scripts(self) -> Scripts:
        return Scripts(self.classes)

    def managers(self, file: File) -> Managers:
        if file not in self._managers:
            self._managers[file] = Managers(file, self.scripts.roles[file])
        return self._managers[file]

    def alias(self, file: File) -> str:
        """How the file calls bmtrain, or will once the import is added."""
        bindings = file.names.module.bindings
        for name, found in bindings.items():
            if any(_is_bmtrain(binding) for binding in found):
                return name
        return "bmtrain" if self._taken(file) else "bmt"

    def has_import(self, file: File) -> bool:
        return any(_is_bmtrain(binding) for found in file.names.module.bindings.values() for binding in found)

    @staticmethod
    def _taken(file: File) -> bool:
        return any("bmt" in scope.bindings for scope in file.names.scopes.values())


def _is_bmtrain(binding: Binding) -> bool:
    value = binding.value
    return isinstance(value, Import) and value.module == "bmtrain" and not value.name
