"""Which files train or build models, where a script starts, and what its parts need."""

from __future__ import annotations

import ast
import re
from functools import cached_property

from rewriter.analyze.classes import Classes, external_kind
from rewriter.analyze.collectives import Collectives, Guard, as_guard, guards
from rewriter.analyze.names import dotted, walk
from rewriter.analyze.project import ClassInfo, External, File, FunctionInfo, ModuleRef
from rewriter.analyze.roles import Roles, is_optimizer_name, walk_own

SEEDS = {
    "torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.seed", "random.seed",
    "numpy.random.seed", "transformers.set_seed", "lightning.seed_everything",
}  # fmt: skip
_NEEDS = {"torch.save", "torch.utils.data.DataLoader", "torch.multiprocessing.spawn", "torch.amp.GradScaler"}
_PARALLEL = (b"DistributedDataParallel", b"init_process_group", b"DistributedSampler")
_SHARING = (b"DataLoader", b"shard_batch", b"shard_loader", *_PARALLEL)
_TRAINS = re.compile(rb"\.backward\(")


class Scripts:
    """Training scripts of a project and everything they import."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.project = classes.project
        self.roles: dict[File, Roles] = _Roles(classes)
        self.collectives = Collectives(classes, self.roles)
        self._needs: dict[ast.AST, bool] = {}
        self._makes: dict[ast.AST, bool] = {}
        self._steps: dict[ast.AST, bool] = {}
        self._reached: dict[File, set[File]] = {}
        self._unguarded: dict[File, dict[ast.If, Guard]] = {}

    @cached_property
    def entries(self) -> dict[File, list[ast.stmt]]:
        """Files that are run, and the statements that run first."""
        return {file: block for file in self.project if file.convert and (block := self._entry(file))}

    @cached_property
    def training(self) -> set[File]:
        """Files with a loop that trains, and project files that the scripts import."""
        found = {file for file in self.project if _TRAINS.search(file.source.data) and self.trains(file)}
        queue = [file for file in self.entries if file in found or self._builds_model(file) or self.drives(file)]
        for file in queue:
            found |= self._reach(file)
        return found

    def drives(self, file: File) -> bool:
        """Whether a file that is run imports a training loop that no other file starts: it calls it by some name."""
        loops = {target for target in self._reach(file) if target not in self.entries and self.trains(target)}
        return bool(loops) and not any(
            any(self.needs_init(other, s) for s in block) and loops & self._reach(other)
            for other, block in self.entries.items()
            if other is not file
        )

    def feeds_training(self, file: File) -> bool:
        """Whether no program uses a file, or one that trains."""
        programs = [entry for entry in self.entries if file in self._reach(entry)]
        return not programs or any(self.trains(target) for entry in programs for target in self._reach(entry))

    def _reach(self, start: File) -> set[File]:
        """A file and the project files that it imports, at any depth."""
        if start not in self._reached:
            self._reached[start] = self._follow(start)
        return self._reached[start]

    def _follow(self, start: File) -> set[File]:
        found, queue = {start}, [start]
        while queue:
            file = queue.pop()
            for node in file.nodes:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    for target in self._imported(file, node):
                        if target.convert and target not in found:
                            found.add(target)
                            queue.append(target)
        return found

    def only_behind(self, stopped: set[File]) -> dict[File, File]:
        """Files that only scripts which cannot be converted use, each with one such script."""
        behind = {target: file for file in stopped if file in self.entries for target in self._reach(file)}
        for file in self.entries:
            if file not in stopped and file not in behind:
                for target in self._reach(file):
                    behind.pop(target, None)
        return {target: script for target, script in behind.items() if target not in stopped}

    def trains(self, file: File) -> bool:
        for node in file.calls:
            if isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
                owner = file.names.function_of(node)
                inner = owner is not None and owner.name in {"backward", "forward"}
                receiver = node.func.value
                if not inner and not (isinstance(receiver, ast.Call) and dotted(receiver.func) == "super"):
                    roles = self.roles[file]
                    return bool(roles.optimizers or roles.scalers or roles.managers)
        return False

    def _builds_model(self, file: File) -> bool:
        """Whether running a file makes a model of the project."""
        return any(self._constructs(file, statement) for statement in self.entries[file])

    def _imported(self, file: File, node: ast.Import | ast.ImportFrom) -> list[File]:
        found = []
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = self.project.find_module(alias.name, file)
                found.extend([module] if module is not None else [])
            return found
        module = self.project.find_module(node.module or "", file, node.level)
        if module is not None:
            found.append(module)
        for alias in node.names:
            name = f"{node.module}.{alias.name}" if node.module else alias.name
            module = self.project.find_module(name, file, node.level)
            if module is not None:
                found.append(module)
        for alias in node.names:
            target = self.project.resolve(file, ast.Name(id=alias.asname or alias.name, ctx=ast.Load()))
            if isinstance(target, (ClassInfo, FunctionInfo, ModuleRef)):
                found.append(target.file)
        return found

    @cached_property
    def shares_data(self) -> bool:
        """Whether anything in the training files is known to give ranks other data, or can be made to."""
        return any(mark in file.source.data for file in self.training for mark in _SHARING)

    def is_parallel(self, file: File) -> bool:
        """Whether a script gives every rank other data already: by DDP, samplers or a process group."""
        return any(mark in file.source.data for mark in _PARALLEL)

    @cached_property
    def started(self) -> bool:
        """Whether a script of the project starts bmtrain already; its data is then shared out as its author wants."""
        return any(
            b"init_distributed" in file.source.data
            and any(self.project.external(file, call.func) == "bmtrain.init_distributed" for call in file.calls)
            for file in self.project
        )

    # Entry -----------------------------------------------------------------------------------------------------

    def _entry(self, file: File) -> list[ast.stmt]:
        """The statement list in which the script's set-up belongs; empty if the file is not run."""
        for statement in file.tree.body:
            if isinstance(statement, ast.If) and _is_main_test(statement.test):
                return self._descend(file, statement.body)
        body = [s for s in file.tree.body if not isinstance(s, _DEFINITIONS)]
        library = file.path.exists() and (file.path.parent / "__init__.py").exists()
        if not library and any(self.needs_init(file, s) for s in body):
            return self._descend(file, file.tree.body)
        main = next((s for s in file.tree.body if isinstance(s, ast.FunctionDef) and s.name == "main"), None)
        return main.body if main is not None and any(self.needs_init(file, s) for s in main.body) else []

    def _descend(self, file: File, block: list[ast.stmt]) -> list[ast.stmt]:
        """Follow a block that only calls one local function into that function."""
        needing = [s for s in block if not isinstance(s, _DEFINITIONS) and self.needs_init(file, s)]
        if len(needing) == 1 and isinstance(needing[0], (ast.Expr, ast.Assign)):
            value = needing[0].value
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                nested = [c for c in walk(value) if isinstance(c, ast.Call) and c is not value]
                found = self.project.resolve(file, value.func)
                if (
                    isinstance(found, FunctionInfo)
                    and found.file is file
                    and not any(self._call_needs(file, call) for call in nested)
                ):
                    return self._descend(file, found.node.body)
        return block

    def _constructs(self, file: File, node: ast.AST) -> bool:
        for item in walk_own(node):
            if isinstance(item, ast.Call):
                found = self.project.resolve(file, item.func)
                if isinstance(found, ClassInfo):
                    if self.classes.is_module(found):
                        return True
                    if any(self._function_constructs(found.file, method) for method in found.methods.values()):
                        return True
                elif isinstance(found, FunctionInfo) and self._function_constructs(found.file, found.node):
                    return True
        return False

    def _function_constructs(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        if node not in self._makes:
            self._makes[node] = False
            self._makes[node] = any(self._constructs(file, statement) for statement in node.body)
        return self._makes[node]

    def steps(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a function calls backward, or a function of the project that does."""
        if node not in self._steps:
            self._steps[node] = False
            for item in (item for statement in node.body for item in walk_own(statement)):
                if isinstance(item, ast.Call):
                    found = self.project.resolve(file, item.func)
                    called = isinstance(item.func, ast.Attribute) and item.func.attr == "backward"
                    if called or (isinstance(found, FunctionInfo) and self.steps(found.file, found.node)):
                        self._steps[node] = True
        return self._steps[node]

    def needs_init(self, file: File, statement: ast.AST) -> bool:
        """Whether a statement must come after ``init_distributed`` (models, output, seeds, anything about ranks)."""
        roles = self.roles[file]
        held = roles.scalers | {(scope, path.split(".")[0]) for scope, path in roles.optimizers}
        for node in walk_own(statement):
            if isinstance(node, ast.Call) and self._call_needs(file, node):
                return True
            if isinstance(node, ast.Assign) and any(roles.var(target) in held for target in node.targets):
                return True
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if any(roles.var(target) in roles.models for target in node.targets):
                    return True
        return False

    def _call_needs(self, file: File, call: ast.Call) -> bool:
        found = self.project.resolve(file, call.func)
        if isinstance(found, ClassInfo):
            if self.classes.is_module(found):
                return True
            return any(self._function_needs(found.file, method) for method in found.methods.values())
        if isinstance(found, FunctionInfo):
            return self._function_needs(found.file, found.node)
        if isinstance(found, External):
            name = found.name
            return (
                name in SEEDS
                or name in _NEEDS
                or name.startswith(("torch.distributed.", "bmtrain."))
                or is_optimizer_name(name)
                or external_kind(name) == "leaf"
                or name.split(".")[0] in {"tqdm", "wandb"}
            )
        if isinstance(call.func, ast.Name) and call.func.id == "print":
            return file.names.lookup("print", file.names.scope_of(call)) is None
        return False

    def _function_needs(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        if node not in self._needs:
            self._needs[node] = False
            self._needs[node] = any(self.needs_init(file, statement) for statement in node.body)
        return self._needs[node]

    def opened_guards(self, file: File) -> dict[ast.If, Guard]:
        """Rank guards with a collective inside: every rank must enter them."""
        if file not in self._unguarded:
            self._unguarded[file] = {
                guard.node: guard
                for guard in guards(file)
                if any(self.collectives.inside(file, statement) for statement in guard.node.body)
            }
        return self._unguarded[file]

    def in_opened_guard(self, file: File, node: ast.AST) -> bool:
        """Whether a node stands in a rank guard that every rank is to enter."""
        opened = self.opened_guards(file)
        return any(parent in opened for parent in file.names.ancestors(node))

    def in_kept_guard(self, file: File, node: ast.AST) -> bool:
        """Whether only one rank reaches a node, after conversion."""
        opened = self.opened_guards(file)
        child = node
        for parent in file.names.ancestors(node):
            if isinstance(parent, ast.If) and any(child is item for item in parent.body) and parent not in opened:
                if as_guard(file, parent) is not None:
                    return True
            child = parent
        return False


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


def _is_main_test(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Compare)
        and any(isinstance(side, ast.Name) and side.id == "__name__" for side in (test.left, *test.comparators))
        and any(isinstance(side, ast.Constant) and side.value == "__main__" for side in (test.left, *test.comparators))
    )


class _Roles(dict[File, Roles]):
    """Roles of files, computed when first asked for."""

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self._classes = classes

    def __missing__(self, file: File) -> Roles:
        self[file] = Roles(file, self._classes)
        return self[file]
