"""Everything the rules ask about a project, computed when first asked."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from rewriter.analyze.model.pairs import Pairs, find_pairs
from rewriter.analyze.model.parameters import parameter_calls
from rewriter.analyze.model.splits import Splits
from rewriter.analyze.model.stacks import Stacks
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.analyze.read.names import Binding, Import
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.read.project import Project
from rewriter.analyze.training.accelerators import Accelerators, scripts_with_accelerators
from rewriter.analyze.training.batch_flow import BatchFlow
from rewriter.analyze.training.decisions import Decisions
from rewriter.analyze.training.deepspeeds import DeepSpeeds, scripts_with_deepspeed
from rewriter.analyze.training.gpu_names import GpuNames
from rewriter.analyze.training.kept_batches import KeptBatches
from rewriter.analyze.training.left_behind import LeftBehind
from rewriter.analyze.training.managers import Managers
from rewriter.analyze.training.moments import Moments
from rewriter.analyze.training.padded import Padded
from rewriter.analyze.training.read_back import ReadBack
from rewriter.analyze.training.saves import Saves
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.several_ranks import SeveralRanks
from rewriter.analyze.training.values import Values
from rewriter.types import Refusal


class Facts:
    """``blocks`` holds patterns such as ``GPT.h`` that name stacks.

    ``refused`` is why files of other engines did not become ordinary ones. ``tensor_parallel``: the user wants layers
    split.
    """

    def __init__(self, project: Project, blocks: tuple[str, ...] = (), tensor_parallel: bool = False) -> None:
        self.project = project
        self.classes = Classes(project)
        self.blocks = blocks
        self.tensor_parallel = tensor_parallel
        self.refused: Mapping[Path, Sequence[Refusal]] = {}
        self._managers: dict[File, Managers] = {}

    @cached_property
    def stacks(self) -> Stacks:
        return Stacks(self.project, self.classes, self.blocks)

    @cached_property
    def splits(self) -> Splits:
        return Splits(self.stacks)

    @cached_property
    def pairs(self) -> list[Pairs]:
        return list(find_pairs(self.stacks))

    @cached_property
    def scripts(self) -> Scripts:
        return Scripts(self.classes)

    @cached_property
    def programs_with_accelerators(self) -> dict[File, frozenset[File]]:
        """For every program that uses accelerate, its files that do."""
        return scripts_with_accelerators(self.scripts)

    @cached_property
    def accelerators(self) -> dict[frozenset[File], Accelerators]:
        """What is known of the Accelerator of each set of such files."""
        return {files: Accelerators(files, self.scripts) for files in self.programs_with_accelerators.values()}

    @cached_property
    def programs_with_deepspeed(self) -> dict[File, frozenset[File]]:
        """For every program that makes a DeepSpeed engine, its files that know it."""
        return scripts_with_deepspeed(self.scripts)

    @cached_property
    def deepspeeds(self) -> dict[frozenset[File], DeepSpeeds]:
        """What is known of the engine of each set of such files."""
        return {files: DeepSpeeds(files, self.scripts) for files in self.programs_with_deepspeed.values()}

    @cached_property
    def decisions(self) -> Decisions:
        return Decisions(self.scripts)

    @cached_property
    def moments(self) -> Moments:
        return Moments(self.scripts)

    @cached_property
    def padded(self) -> Padded:
        return Padded(self.scripts)

    @cached_property
    def batch_flow(self) -> BatchFlow:
        return BatchFlow(self.padded)

    @cached_property
    def read_back(self) -> ReadBack:
        return ReadBack(self.scripts, self.decisions)

    @cached_property
    def gpu_names(self) -> GpuNames:
        return GpuNames(self.scripts)

    @cached_property
    def kept_batches(self) -> KeptBatches:
        return KeptBatches(self.scripts)

    @cached_property
    def left_behind(self) -> LeftBehind:
        return LeftBehind(self.scripts)

    @cached_property
    def several_ranks(self) -> SeveralRanks:
        return SeveralRanks(self.scripts)

    @cached_property
    def saves(self) -> Saves:
        return Saves(self.scripts)

    @cached_property
    def left_as_it_is(self) -> str:
        """Why no class needs another base; empty if classes do."""
        if self.project.partial or any(stack.requirement() != () for stack in self.stacks.found):
            return ""
        classes = [info for file in self.project for info in self.classes.all(file)]
        distributed = any(
            isinstance(base, External) and base.name == "bmtrain.DistributedModule"
            for info in classes
            for _, base in self.classes.bases(info)
        )
        made = any(True for file in self.project for _ in parameter_calls(file, self.classes))
        trained = any(file not in self._initialised for file in self.scripts.training if file in self.scripts.entries)
        if distributed and not made and not trained:
            return "the project is written for bmtrain"
        files = sum(file.convert for file in self.project)
        if files > 20 and not self.scripts.training and not any(self._holds_a_module(info) for info in classes):
            return "a library of layers; the model that holds them shards them"
        return ""

    @cached_property
    def _initialised(self) -> set[File]:
        return {file for file in self.project if b"init_distributed" in file.source.data}

    def _holds_a_module(self, info: ClassInfo) -> bool:
        """Whether a module constructs another module of the project."""
        if not self.classes.is_module(info):
            return False
        for node in walk(info.node):
            if isinstance(node, ast.Call):
                found = self.project.resolve(info.file, node.func)
                if isinstance(found, ClassInfo) and found is not info and self.classes.is_module(found):
                    return True
        return False

    def managers(self, file: File) -> Managers:
        if file not in self._managers:
            self._managers[file] = Managers(file, self.scripts.roles[file])
        return self._managers[file]

    def values(self, file: File) -> Values:
        return self.scripts.collectives.values(file)

    def alias(self, file: File) -> str:
        """How the file calls bmtrain, or will once the import is added."""
        return self._imported(file) or ("bmtrain" if self._taken(file) else "bmt")

    def has_import(self, file: File) -> bool:
        return bool(self._imported(file))

    @staticmethod
    def _imported(file: File) -> str:
        """The name under which a file imports bmtrain, if it means nothing else."""
        bindings = file.names.module.bindings
        return next((name for name, found in bindings.items() if all(map(_is_bmtrain, found))), "")

    @staticmethod
    def _taken(file: File) -> bool:
        return any("bmt" in scope.bindings for scope in file.names.scopes.values())


def _is_bmtrain(binding: Binding) -> bool:
    value = binding.value
    return isinstance(value, Import) and value.module == "bmtrain" and not value.name
