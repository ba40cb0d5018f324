"""Scripts that train through accelerate: what holds an Accelerator, what it was told, what it prepares."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo
from rewriter.analyze.read.names import Import
from rewriter.analyze.read.nodes import dotted, is_backward, walk
from rewriter.analyze.training.roles import Var
from rewriter.analyze.training.scripts import Scripts

CLASSES = {"accelerate.Accelerator", "accelerate.accelerator.Accelerator"}
SKIPS = {"accelerate.skip_first_batches", "accelerate.data_loader.skip_first_batches"}
PREPARES = {"prepare", "prepare_model", "prepare_optimizer", "prepare_scheduler", "prepare_data_loader"}
TESTS = "accelerate.test_utils."
"""What its own tests take instead of data."""
EVALUATED = re.compile(r"val|test|eval|dev|infer|pred", re.I)
"""What a loader of data that is not trained on is called."""

_KINDS = {"prepare_model": "model", "prepare_optimizer": "optimizer"}
_KINDS |= {"prepare_scheduler": "scheduler", "prepare_data_loader": "loader"}
_ASKED_FOR_BY = {
    "mixed_precision": "mixed_precision", "autocast": "mixed_precision", "prepare": "mixed_precision",
    "prepare_model": "mixed_precision", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "backward": "gradient_accumulation_steps", "accumulate": "gradient_accumulation_steps",
    "sync_gradients": "gradient_accumulation_steps", "project_dir": "project_dir", "init_trackers": "project_dir",
    "logging_dir": "logging_dir",
}  # fmt: skip
"""Which attributes need to know what the Accelerator was told for a keyword."""
_LOADER = re.compile(r"loader|^(?:\w+_)?dl$|^(?:\w+_)?(?:data|batches)$", re.I)
_OF_LOGS = {"log_with", "project_dir", "logging_dir"}
_AROUND = {"enumerate", "tqdm", "trange", "islice", "skip_first_batches", "iter", "cycle"}


def scripts_with_accelerators(scripts: Scripts) -> dict[File, frozenset[File]]:
    """For every program that uses accelerate, its files that do."""
    found = {}
    for program in scripts.entries:
        files = frozenset(file for file in scripts.reach(program) if b"accelerat" in file.source.data)
        if any(scripts.project.calls_of(files, CLASSES)):
            found[program] = files
    return found


class Accelerators:
    """What is known of the Accelerator of one script, whose files are ``files``."""

    def __init__(self, files: frozenset[File], scripts: Scripts) -> None:
        self.files = sorted(files, key=lambda file: file.place)
        self.scripts = scripts
        self.project = scripts.project

    # Who holds it -----------------------------------------------------

    @cached_property
    def made(self) -> list[tuple[File, ast.Call]]:
        """The calls that make it."""
        return [*self.project.calls_of(self.files, CLASSES)]

    @cached_property
    def names(self) -> frozenset[str]:
        """The last names of the variables that hold it."""
        found = set()
        for file, call in self.made:
            statement = file.names.statement_of(call)
            if isinstance(statement, (ast.Assign, ast.AnnAssign)):
                found |= {last_name(target) for target in targets(statement)}
        for _ in range(3):
            for file in self.files:
                for node in file.nodes:
                    if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Name, ast.Attribute)):
                        if last_name(node.value) in found and self._is_bound_by_value(file, node.value):
                            found |= {last_name(target) for target in node.targets}
        return frozenset(found - {""})

    def is_one(self, file: File, node: ast.AST) -> bool:
        """Whether an expression is the Accelerator."""
        return (
            isinstance(node, (ast.Name, ast.Attribute))
            and isinstance(node.ctx, ast.Load)
            and last_name(node) in self.names
            and self._is_bound_by_value(file, node)
            and not self.project.external(file, node)  # as torch.accelerator
        )

    def holders(self) -> set[File]:
        """The files in which it is made or used."""
        return {file for file, _ in self.made} | {f for f in self.files if any(self.is_one(f, n) for n in f.nodes)}

    @staticmethod
    def _is_bound_by_value(file: File, node: ast.expr) -> bool:
        if not isinstance(node, ast.Name):
            return True
        found = file.names.lookup(node.id, file.names.scope_of(node))
        kinds = (Import, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        return found is not None and not any(isinstance(binding.value, kinds) for binding in found[1])

    def is_handed_on(self, file: File, node: ast.expr) -> bool:
        """Whether the Accelerator itself stands where a function of the script gets it under the same name."""
        parent = file.names.parents[node]
        if isinstance(parent, (ast.Assign, ast.Return)):
            return True
        if isinstance(parent, ast.Tuple):
            return isinstance(file.names.parents[parent], ast.Return)
        call = file.names.parents[parent] if isinstance(parent, ast.keyword) else parent
        if not isinstance(call, ast.Call):
            return False
        found = self._called(file, call.func)
        function = found if isinstance(found, FunctionInfo) else None
        if isinstance(found, ClassInfo):
            method = self.scripts.classes.method(found, "__init__")
            function = FunctionInfo(method[0].file, method[1]) if method is not None else None
        if isinstance(call.func, ast.Attribute) and function is None:
            function = next(iter(self.scripts.collectives.instances.methods(file, call.func)), None)
        if function is None:
            return False
        if isinstance(parent, ast.keyword):
            return parent.arg in self.names
        index, listed = call.args.index(node), function.parameters
        return index < len(listed) and listed[index] in self.names

    def _called(self, file: File, func: ast.expr) -> object:
        """What is called; of two, of which one is accelerate's own for its tests, the other."""
        found = self.project.resolve(file, func)
        if found is None and isinstance(func, ast.Name):
            meanings = self.project.meanings(file, func)
            others = [m for m in meanings if not (isinstance(m, External) and m.name.startswith(TESTS))]
            return others[0] if len(others) == 1 and len(meanings) > 1 else None
        return found

    # What it was told -----------------------------------------------------

    @cached_property
    def options(self) -> dict[str, list[tuple[File, ast.expr]]]:
        """What its calls give for their keywords; ``*`` for all that has none."""
        found: dict[str, list[tuple[File, ast.expr]]] = {}
        for file, call in self.made:
            for keyword in call.keywords:
                named = self._options_in(file, keyword.value) if keyword.arg is None else None
                for name, value in named if named is not None else [(keyword.arg or "*", keyword.value)]:
                    found.setdefault(name, []).append((file, value))
            for argument in call.args:
                found.setdefault("*", []).append((file, argument))
        return found

    def _options_in(self, file: File, node: ast.expr) -> list[tuple[str, ast.expr]] | None:
        """The keywords in ``**options``, where all that is put there is seen; None if it is not.

        Under a test only what tells where logs go may be put there: the tracker starts where the script starts it.
        """
        written = _items_of(node)
        if written is not None or not isinstance(node, ast.Name):
            return written
        found: list[tuple[str, ast.expr]] = []
        given = False
        variable, block = self.scripts.roles[file].var(node), file.names.siblings(file.names.statement_of(node))
        for item in file.nodes:
            if item is node or not isinstance(item, ast.Name) or self.scripts.roles[file].var(item) != variable:
                continue
            statement = file.names.statement_of(item)
            key = file.names.parents[item]
            match statement:
                case ast.Assign(targets=[target], value=value) if target is item:
                    items = _items_of(value)
                case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(name))) as target], value=value):
                    items = [(name, value)] if target is key else None
                case _:
                    items = None
            if items is None or (statement not in block and not {name for name, _ in items} <= _OF_LOGS):
                return None
            given, found = True, found + items
        return found if given else None

    @cached_property
    def _folders(self) -> dict[str, tuple[File, ast.expr]]:
        """What a ``ProjectConfiguration`` that it is told says of folders."""
        found = self.options.get("project_config", [])
        if not found or _is_nothing(found[0][1]):
            return {}
        file, value = found[0]
        roles = self.scripts.roles[file]
        if isinstance(value, (ast.Name, ast.Attribute)):
            made = [given for v, given, _, part in roles.assignments if v == roles.var(value) and not part]
            value = made[0] if len(made) == 1 else value
        if not isinstance(value, ast.Call) or last_name(value.func) != "ProjectConfiguration":
            return {}
        names = [*zip(("project_dir", "logging_dir"), value.args, strict=False)]
        names += [(keyword.arg, keyword.value) for keyword in value.keywords if keyword.arg is not None]
        return {name: (file, item) for name, item in names if not _is_nothing(item)}

    def option(self, name: str) -> tuple[File, ast.expr] | None:
        """What it was told for a keyword, where that is one thing and not the same as nothing."""
        values = self.options.get(name, [])
        if values and not _is_nothing(values[0][1]):
            return values[0]
        return self._folders.get(name)

    def is_known(self, name: str, file: File, node: ast.AST) -> bool:
        """Whether what it was told for a keyword means the same at a node."""
        found = self.option(name)
        if found is None or isinstance(found[1], ast.Constant):
            return True
        told, value = found
        variables = {item.id for item in walk(value) if isinstance(item, ast.Name)}
        function = told.names.function_of(value)
        if told is not file:
            return False
        if function is not None and file.names.function_of(node) is not function:
            return variables == {"self"} and file.names.class_of(node) is told.names.class_of(value)
        return not any(
            isinstance(item, ast.Name)
            and item.id in variables
            and isinstance(item.ctx, ast.Store)
            and item.lineno > value.lineno
            and file.names.function_of(item) is function
            for item in file.nodes
        )

    @cached_property
    def asked_elsewhere(self) -> set[str]:
        """What it was told that is asked for where it is not known otherwise."""
        found = set()
        for file in self.files:
            for node in file.nodes:
                if isinstance(node, ast.Attribute) and self.is_one(file, node.value):
                    name = _ASKED_FOR_BY.get(node.attr, "")
                    if name and not self.is_known(name, file, node):
                        found.add(name)
        return found

    # What it prepares -----------------------------------------------------

    @cached_property
    def prepared(self) -> list[tuple[File, ast.Call, ast.expr, str]]:
        """Files, calls, what each call prepares, and whether that is a model, optimizer, scheduler or loader."""
        found = []
        for file in self.files:
            for call in file.calls:
                if isinstance(call.func, ast.Attribute) and call.func.attr in PREPARES:
                    if self.is_one(file, call.func.value):
                        for item in call.args:
                            kind = _KINDS.get(call.func.attr) or self._kind(file, item)
                            found.append((file, call, item, kind))
        return found

    def _kind(self, file: File, node: ast.expr) -> str:
        roles, variable = self.scripts.roles[file], self.scripts.roles[file].var(node)
        values = [value for v, value, _, part in roles.assignments if v == variable and not part]
        values += [node] if isinstance(node, ast.Call) else []
        names = [self.project.external(file, value.func) for value in values if isinstance(value, ast.Call)]
        name = last_name(node)
        if any(found == "torch.utils.data.DataLoader" for found in names) or _LOADER.search(name):
            return "loader"
        if any("lr_scheduler" in found or "schedule" in found for found in names) or re.search("sched", name, re.I):
            return "scheduler"
        if variable in roles.optimizers or re.search(r"opt", name, re.I):
            return "optimizer"
        called = any(isinstance(c.func, ast.Name) and c.func.id == name for f in self.files for c in f.calls)
        if roles.is_model(node) or called or re.search(r"model|net", name, re.I):
            return "model"
        classes = [self.project.resolve(file, value.func) for value in values if isinstance(value, ast.Call)]
        modules = (isinstance(c, ClassInfo) and self.scripts.classes.is_module(c) for c in classes)
        return "model" if any(modules) else ""

    def names_of(self, *kinds: str) -> set[str]:
        """The last names of what is prepared of some kinds."""
        found = set()
        for file, call, item, kind in self.prepared:
            if kind in kinds:
                found.add(last_name(item))
                statement = file.names.statement_of(call)
                if isinstance(statement, ast.Assign) and statement.value is call:
                    into = targets(statement)
                    if len(into) == len(call.args):
                        found.add(last_name(into[call.args.index(item)]))
        return found - {""}

    # Loops over prepared data -----------------------------------------------------

    def loader(self, file: File, node: ast.expr) -> ast.expr:
        """The loader that a loop goes through, whatever stands around it."""
        while isinstance(node, ast.Call) and node.args and last_name(node.func) in _AROUND:
            node = node.args[0]
        return node

    def is_prepared_loader(self, file: File, node: ast.expr, deep: int = 0) -> bool:
        node = self.loader(file, node)
        if last_name(node) in self.names_of("loader"):
            return True
        return deep < 4 and any(
            self.is_prepared_loader(other, value, deep + 1) for other, value in self._values(file, node)
        )

    def _values(self, file: File, node: ast.expr) -> Iterator[tuple[File, ast.expr]]:
        """What a variable is given, in its function or by the calls of it."""
        variable = self.scripts.roles[file].var(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        if variable is None:
            return
        for v, value, _, part in self.scripts.roles[file].assignments:
            if v == variable and not part and value is not node:
                yield file, value
        if isinstance(variable[0], (ast.FunctionDef, ast.AsyncFunctionDef)) and "." not in variable[1]:
            yield from self.scripts.collectives.instances.given(file, variable[0], variable[1])

    def trains(self, file: File, node: ast.AST) -> bool:
        """Whether backward is called in a piece of code, or in a function of the project that it calls."""
        for item in walk(node):
            if isinstance(item, ast.Call):
                if is_backward(item):
                    return True
                found = self.project.resolve(file, item.func)
                if isinstance(found, FunctionInfo) and self.scripts.steps(found.file, found.node):
                    return True
        return False

    @cached_property
    def loops(self) -> dict[ast.For, File]:
        """Loops over prepared loaders."""
        return {
            node: file
            for file in self.files
            for node in file.nodes
            if isinstance(node, ast.For) and self.is_prepared_loader(file, node.iter)
        }

    def loop_around(self, file: File, node: ast.AST) -> ast.For | ast.While | None:
        """The loop over batches that a node stands in."""
        for parent in file.names.ancestors(node):
            if isinstance(parent, ast.For) and parent in self.loops:
                return parent
            if isinstance(parent, ast.While) and self.trains(file, parent):
                return parent
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                return None
        return None

    @cached_property
    def trained_on(self) -> set[str]:
        """The last names of the loaders that loops which train go through."""
        return {last_name(self.loader(file, loop.iter)) for loop, file in self.loops.items() if self.trains(file, loop)}

    def shares(self, file: File, node: ast.expr, place: ast.AST) -> bool | None:
        """Whether a value is of a rank's share of the data; None if that is not known."""
        loop = self.loop_around(file, place)
        if loop is not None:
            return self._goes_through_share(file, loop)
        variables = {
            variable
            for item in walk(node)
            if isinstance(item, (ast.Name, ast.Attribute)) and (variable := self.scripts.roles[file].var(item))
        }
        answers = {answer for v in variables for answer in self._made_from_share(file, v, place)}
        if True in answers:
            return True
        return False if answers == {False} else None

    def _goes_through_share(self, file: File, loop: ast.For | ast.While) -> bool | None:
        if self.trains(file, loop):
            return True
        assert isinstance(loop, ast.For)
        names = self._origins(file, self.loader(file, loop.iter))
        if names & self.trained_on:
            return True
        seen = self.names_of("loader") if self.trained_on - {""} else set[str]()  # prepared, and others are trained on
        return False if names and all(EVALUATED.search(name) or name in seen for name in names) else None

    def _origins(self, file: File, node: ast.expr, deep: int = 0) -> set[str]:
        """The last names of the loaders that a variable stands for: an argument is what the calls give for it."""
        variable = self.scripts.roles[file].var(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        if variable is not None and deep < 4 and isinstance(variable[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = list(self.scripts.collectives.instances.given(file, variable[0], variable[1]))
            if given:
                return set().union(*(self._origins(other, value, deep + 1) for other, value in given))
        return {last_name(self.loader(file, node))}

    def _made_from_share(self, file: File, variable: Var, place: ast.AST) -> Iterator[bool]:
        """Whether what a variable holds comes out of loops that train, or that only evaluate."""
        roles = self.scripts.roles[file]
        for node in walk(variable[0]):
            written: list[ast.expr] = []
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                written = targets(node) if isinstance(node, ast.Assign) else [node.target]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                written = [node.func.value]
            if not any(roles.var(target) == variable for target in written):
                continue
            loop = self.loop_around(file, node)
            if loop is not None:
                yield self._goes_through_share(file, loop) is not False
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node is not place:
                found = self.project.resolve(file, node.value.func)
                if isinstance(found, FunctionInfo):
                    yield self.scripts.steps(found.file, found.node)


def last_name(node: ast.AST) -> str:
    """``c`` of ``a.b.c``; empty for other code."""
    return (dotted(node) or "").split(".")[-1]


def targets(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    """What an assignment gives values to, the parts of a tuple one by one."""
    if isinstance(statement, ast.AnnAssign):
        return [statement.target]
    if len(statement.targets) != 1:
        return list(statement.targets)
    target = statement.targets[0]
    return list(target.elts) if isinstance(target, (ast.Tuple, ast.List)) else [target]


def _items_of(node: ast.expr) -> list[tuple[str, ast.expr]] | None:
    """The items of ``{"a": 1}`` or ``dict(a=1)``."""
    match node:
        case ast.Dict(keys=keys, values=values):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            items = [(n, value) for n, value in zip(names, values, strict=True) if isinstance(n, str)]
            return items if len(items) == len(names) else None
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            items = [(keyword.arg, keyword.value) for keyword in keywords if keyword.arg is not None]
            return items if len(items) == len(keywords) else None
    return None


def _is_nothing(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
