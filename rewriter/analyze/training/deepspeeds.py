"""Scripts that train through DeepSpeed: what makes the engine, and which variables hold it, its optimizer and so on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, positional
from rewriter.analyze.training.roles import Var
from rewriter.analyze.training.scripts import Scripts

INITIALIZE = {"deepspeed.initialize", "deepspeed.runtime.engine.initialize"}
_PARAMETERS = (
    "args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "distributed_port", "mpu",
    "dist_init_required", "collate_fn", "config", "mesh_param", "config_params",
)  # fmt: skip
"""What ``deepspeed.initialize`` takes, in its order."""
_DEEP = 4
"""Through how many functions a variable is followed."""
_RESULTS = ("engine", "optimizer", "loader", "scheduler")


def scripts_with_deepspeed(scripts: Scripts) -> dict[File, frozenset[File]]:
    """For every program that makes a DeepSpeed engine, its files that name DeepSpeed or get the engine."""
    found = {}
    for program in scripts.entries:
        reached = scripts.reach(program)
        files = {file for file in reached if b"deepspeed" in file.source.data}
        if any(scripts.project.calls_of(files, INITIALIZE)):
            found[program] = frozenset(files | DeepSpeeds(frozenset(reached), scripts).holders())
    return found


class DeepSpeeds:
    """What is known of the engine of one script, whose files are ``files``."""

    def __init__(self, files: frozenset[File], scripts: Scripts) -> None:
        self.files = sorted(files, key=lambda file: file.place)
        self.scripts = scripts
        self.project = scripts.project

    @cached_property
    def made(self) -> list[tuple[File, ast.Call]]:
        """The calls that make it."""
        return [*self.project.calls_of(self.files, INITIALIZE)]

    def holders(self) -> set[File]:
        """The files in which it is made or used."""
        return {file for file, _ in self.made} | set(self.held["engine"])

    # The call that makes it -----------------------------------------------------

    @staticmethod
    def given(call: ast.Call) -> dict[str, ast.expr] | None:
        """What the call is given, by keyword; None if that is not seen."""
        if any(isinstance(item, ast.Starred) for item in call.args) or len(call.args) > len(_PARAMETERS):
            return None
        if any(keyword.arg is None for keyword in call.keywords):
            return None
        listed = dict(zip(_PARAMETERS, call.args, strict=False))
        listed |= {keyword.arg or "": keyword.value for keyword in call.keywords}
        return {name: value for name, value in listed.items() if not _is_nothing(value)}

    @staticmethod
    def results(file: File, call: ast.Call) -> dict[str, ast.expr] | None:
        """The variables that get the four results, without ``_`` that nothing reads; None if that is not seen."""
        statement = file.names.parents[call]
        if isinstance(statement, ast.Subscript):  # deepspeed.initialize(...)[0]
            outer = file.names.parents[statement]
            first = isinstance(statement.slice, ast.Constant) and statement.slice.value == 0
            if first and isinstance(outer, ast.Assign) and len(outer.targets) == 1:
                return {"engine": outer.targets[0]}
            return None
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return None
        target = statement.targets[0]
        if not isinstance(target, (ast.Tuple, ast.List)):
            return None
        items = list(target.elts)
        if items and isinstance(items[-1], ast.Starred):
            rest = items.pop().value  # type: ignore[attr-defined]
            if not is_unused(file, rest):
                return None
        elif len(items) != len(_RESULTS):
            return None
        found = {}
        for name, item in zip(_RESULTS, items, strict=False):
            if dotted(item) is None:
                return None
            dropped = isinstance(item, ast.Name) and item.id.startswith("_") and is_unused(file, item)
            if name == "engine" or not dropped:
                found[name] = item
        return found or None

    # Who holds what it makes -----------------------------------------------------

    def named(self, kind: str) -> str:
        """The name of the optimizer or schedule where the engine is made; one of its own for what has none."""
        file, call = self.made[0]
        results, given = self.results(file, call) or {}, self.given(call) or {}
        asked = "lr_scheduler" if kind == "scheduler" else kind
        node = results.get(kind) or given.get(asked)
        if node is not None and dotted(node) is not None:
            return dotted(node) or ""
        engine = dotted(results["engine"]) if results else None
        return f"self.{asked}" if (engine or "").startswith("self.") else asked

    @cached_property
    def held(self) -> dict[str, dict[File, set[Var]]]:
        """By kind and file, the variables that hold the engine, its optimizer or its schedule."""
        found: dict[str, dict[File, set[Var]]] = {"engine": {}, "optimizer": {}, "scheduler": {}}
        if len(self.made) != 1 or (results := self.results(*self.made[0])) is None:
            return found
        file, call = self.made[0]
        variable = self.scripts.roles[file].var(results["engine"])
        if variable is None:
            return found
        for kind, files in found.items():
            name = variable[1] if kind == "engine" else self.named(kind)
            files[file] = {self._variable(file, call, name)}
            for _ in range(_DEEP):
                before = sum(map(len, files.values()))
                for other in list(files):
                    for place, target in list(self._handed_on(other, files[other])):
                        files.setdefault(place, set()).add(target)
                if sum(map(len, files.values())) == before:
                    break
        return found

    @staticmethod
    def _variable(file: File, place: ast.AST, name: str) -> Var:
        """The variable that a name is, or would be, where a node stands."""
        root = name.split(".")[0]
        owner = file.names.class_of(place)
        if root == "self" and "." in name and owner is not None:
            return owner, name
        found = file.names.lookup(root, file.names.scope_of(place))
        return (found[0] if found is not None else file.names.scope_of(place)).node, name

    def is_held(self, kind: str, file: File, node: ast.AST) -> bool:
        """Whether an expression is the engine, its optimizer or its schedule, where it is read."""
        if not isinstance(node, (ast.Name, ast.Attribute)) or not isinstance(node.ctx, ast.Load):
            return False
        held = self.held[kind].get(file, set())
        return bool(held) and self.scripts.roles[file].var(node) in held

    def name_at(self, kind: str, file: File, place: ast.AST) -> str:
        """Under which name the optimizer or schedule is seen where a node stands; empty where it is not."""
        held = self.held[kind].get(file, set())
        for variable in sorted(held, key=lambda item: item[1]):
            scope, name = variable
            if self._variable(file, place, name) != variable:
                continue
            own = isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)) and self._always_given(
                file, scope, name, held
            )
            if own or not self._is_parameter(scope, name):
                return name
        return ""

    @staticmethod
    def _is_parameter(scope: ast.AST, name: str) -> bool:
        if not isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return False
        given = scope.args
        return name in {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}

    def _always_given(self, file: File, function: Function, name: str, held: set[Var]) -> bool:
        """Whether every call of a function gives a parameter what is held."""
        instances = self.scripts.collectives.instances
        given, calls = list(instances.given(file, function, name)), list(instances.calls(file, function))
        kind = next(files for files in self.held.values() if files.get(file) is held)
        return 0 < len(given) == len(calls) and all(
            self.scripts.roles[other].var(value) in kind.get(other, set()) for other, value in given
        )

    def _handed_on(self, file: File, held: set[Var]) -> Iterator[tuple[File, Var]]:
        roles = self.scripts.roles[file]
        for node in file.nodes:
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                if roles.var(node) in held:
                    yield from self.receivers(file, node)

    def receivers(self, file: File, node: ast.expr) -> list[tuple[File, Var]]:
        """The variables that get a value from where it stands: another name, a parameter, what a call gives back."""
        parent = file.names.parents[node]
        roles = self.scripts.roles
        if isinstance(parent, ast.Assign) and parent.value is node:
            variables = [roles[file].var(target) for target in parent.targets]
            return [(file, variable) for variable in variables if variable is not None]
        outer = file.names.parents.get(parent)
        given_back = parent if isinstance(parent, ast.Return) else outer if isinstance(parent, ast.Tuple) else None
        if isinstance(given_back, ast.Return):
            return list(self._given_back(file, node, parent))
        if isinstance(parent, ast.Tuple) and isinstance(outer, ast.Assign) and outer.value is parent:
            target = outer.targets[0]
            if len(outer.targets) == 1 and isinstance(target, ast.Tuple) and len(target.elts) == len(parent.elts):
                variable = roles[file].var(target.elts[parent.elts.index(node)])
                return [(file, variable)] if variable is not None else []
        parameter = self.parameter(file, node)
        return [parameter] if parameter is not None else []

    def _given_back(self, file: File, node: ast.expr, parent: ast.AST) -> Iterator[tuple[File, Var]]:
        function = file.names.function_of(node)
        if function is None:
            return
        for other, call in self.scripts.collectives.instances.calls(file, function):
            statement = other.names.parents[call]
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                continue
            target = statement.targets[0]
            if isinstance(parent, ast.Tuple):
                if not isinstance(target, ast.Tuple) or len(target.elts) != len(parent.elts):
                    continue
                target = target.elts[parent.elts.index(node)]
            variable = self.scripts.roles[other].var(target)
            if variable is not None:
                yield other, variable

    def parameter(self, file: File, node: ast.expr) -> tuple[File, Var] | None:
        """The parameter of a function of the project that gets an argument."""
        parent = file.names.parents[node]
        call = file.names.parents[parent] if isinstance(parent, ast.keyword) else parent
        if not isinstance(call, ast.Call) or call.func is node:
            return None
        target = self._function(file, call)
        if target is None or any(isinstance(item, ast.Starred) for item in call.args):
            return None
        other, function, method = target
        listed = positional(function)
        named = [argument.arg for argument in function.args.kwonlyargs]
        if isinstance(parent, ast.keyword):
            return (other, (function, parent.arg)) if parent.arg in {*listed, *named} else None
        index = call.args.index(node) + method
        return (other, (function, listed[index])) if index < len(listed) else None

    def _function(self, file: File, call: ast.Call) -> tuple[File, Function, int] | None:
        """The function of the project that a call runs, and how many arguments it gets by itself."""
        found = self.project.resolve(file, call.func)
        if isinstance(found, FunctionInfo):
            return found.file, found.node, 0
        if isinstance(found, ClassInfo):
            method = self.scripts.classes.method(found, "__init__")
            return (method[0].file, method[1], 1) if method is not None else None
        if isinstance(call.func, ast.Attribute):
            methods = self.scripts.collectives.instances.methods(file, call.func)
            owner = file.names.class_of(call)
            if not methods and owner is not None and dotted(call.func.value) == "self":
                own = self.scripts.classes.method(file.class_info(owner), call.func.attr)
                methods = [own[0].file.function_info(own[1])] if own is not None else []
            return (methods[0].file, methods[0].node, 1) if methods else None
        return None


def is_unused(file: File, node: ast.expr) -> bool:
    """Whether a result goes to a variable that nothing reads, such as ``_``."""
    if not isinstance(node, ast.Name):
        return False
    return not any(isinstance(n, ast.Name) and n.id == node.id and isinstance(n.ctx, ast.Load) for n in file.nodes)


def _is_nothing(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
