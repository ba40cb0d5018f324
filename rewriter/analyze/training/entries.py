"""Where a script starts: which of its statements need the ranks, and in which block they stand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from rewriter.analyze.read.circles import AnyCalled
from rewriter.analyze.read.classes import Classes, external_kind
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo, ModuleRef, Resolved
from rewriter.analyze.read.names import Binding, Import
from rewriter.analyze.read.nodes import dotted, held_in, is_backward, walk, walk_own
from rewriter.analyze.training.folders import done_when_made, fails_if_there, is_asked_for
from rewriter.analyze.training.roles import Roles, Var, is_optimizer_name
from rewriter.analyze.training.writers import COMMANDS, WRITERS, WRITING_METHODS, log_file, opens_for_writing

SEEDS = {
    "torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.seed", "random.seed",
    "numpy.random.seed", "transformers.set_seed", "lightning.seed_everything",
}  # fmt: skip
_DRAWS = {
    "torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.normal", "torch.bernoulli",
    "torch.multinomial", "torch.utils.data.random_split", "sklearn.model_selection.train_test_split", "random.shuffle",
    "random.sample", "random.choices", "numpy.random.rand", "numpy.random.randn", "numpy.random.normal",
    "numpy.random.uniform", "numpy.random.permutation", "numpy.random.shuffle", "numpy.random.choice",
    "numpy.random.random", "numpy.random.standard_normal", "numpy.random.random_sample",
}  # fmt: skip
"""What makes data at random, or orders or divides them so: all ranks are to have the same."""
_GIVEN_SEED = {"generator", "random_state"}
_KEEPING = {"register", "register_module", "update", "setdefault", "keys", "items", "values", "pop", "copy"}
_KNOWN_BEFORE = {"bmtrain.rank"}
"""What ranks can ask before they are started."""
_NEEDS = {"torch.save", "torch.utils.data.DataLoader", "torch.multiprocessing.spawn", "torch.amp.GradScaler"}


@dataclass(frozen=True, slots=True)
class Registered:
    """Where models get names to be made by: in a name of a file, an object of a class, or any table of a file."""

    names: set[tuple[File, str]]
    owners: set[ast.ClassDef]
    files: set[File]


class Entries:
    """Answers for all files of a project, remembered per function."""

    def __init__(self, classes: Classes, roles: dict[File, Roles]) -> None:
        self.classes = classes
        self.project = classes.project
        self.roles = roles
        self._needs = AnyCalled()
        self._constructing = AnyCalled()
        self._files = AnyCalled()
        self._backward = AnyCalled()
        self._light: dict[ast.AST, bool] = {}
        self._models: dict[File, bool] = {}
        self._told: dict[File, set[Var]] = {}
        self._found: Registered | None = None

    def block(self, file: File) -> list[ast.stmt]:
        """The statement list in which the script's set-up belongs; empty if the file is not run."""
        guarded = [s for s in file.tree.body if is_main_test(s)]
        body = [s for s in file.tree.body if not isinstance(s, DEFINITIONS) and s not in guarded]
        packaged = file.path.exists() and (file.path.parent / "__init__.py").exists()
        library = packaged and not self.trains(file, [*body, *guarded])
        if not library and any(self.needs_init(file, s) for s in body):
            imported = self._is_imported(file)
            if not imported or (not guarded and any(self._needs_ranks(file, s) for s in body)):
                return self._descend(file, file.tree.body)
        if guarded:
            return self._descend(file, guarded[0].body)
        functions = [s for s in file.tree.body if isinstance(s, ast.FunctionDef)]
        mains = [s for s in functions if s.name == "main" and any(self.needs_init(file, item) for item in s.body)]
        if b"parse_args" not in file.source.data:
            functions = []
        mains += [s for s in functions if _reads_arguments(s) and self._function_constructs(file, s)]
        return mains[0].body if mains else []

    def runs_at_import(self, file: File) -> bool:
        """Whether a file's own statements are what starts in it, and another file imports it."""
        guarded = any(is_main_test(s) for s in file.tree.body)
        return not guarded and any(self._needs_ranks(file, s) for s in file.tree.body) and self._is_imported(file)

    def seed_at_import(self, file: File) -> int | None:
        """The number in a file's own ``torch.manual_seed(7)``."""
        for statement in file.tree.body:
            match statement:
                case ast.Expr(value=ast.Call(func=func, args=[ast.Constant(value=int() as seed)])):
                    if self.project.external(file, func) == "torch.manual_seed":
                        return seed
        return None

    def _needs_ranks(self, file: File, statement: ast.stmt) -> bool:
        """Whether a statement must come after the start: it does more than seed or print, which any rank can."""
        if isinstance(statement, DEFINITIONS) or not self.needs_init(file, statement):
            return False
        calls = [item for item in walk_own(statement) if isinstance(item, ast.Call) and self._call_needs(file, item)]
        return not calls or not all(self._is_light(file, call) for call in calls)

    def _is_light(self, file: File, call: ast.Call) -> bool:
        """Whether a call only seeds or prints, itself or in a function of the project."""
        if self.project.external(file, call.func) in SEEDS | {"bmtrain.print_rank"}:
            return True
        if isinstance(call.func, ast.Name) and call.func.id == "print":
            return True
        found = self.project.resolve(file, call.func)
        if not isinstance(found, FunctionInfo):
            return False
        if found.node not in self._light:
            self._light[found.node] = False
            self._light[found.node] = not any(self._needs_ranks(found.file, item) for item in found.node.body)
        return self._light[found.node]

    def _is_imported(self, file: File) -> bool:
        """Whether another file of the project imports this one, by name: what runs then is not what runs alone."""
        name = file.path.stem
        return any(
            name in {(node.module or "").split(".")[-1], *(alias.name for alias in node.names)}
            if isinstance(node, ast.ImportFrom)
            else any(alias.name.split(".")[-1] == name for alias in node.names)
            for other in self.project
            if other is not file and name.encode() in other.source.data
            for node in other.nodes
            if isinstance(node, (ast.Import, ast.ImportFrom))
        )

    def _descend(self, file: File, block: list[ast.stmt]) -> list[ast.stmt]:
        """Follow a block that only calls one local function into that function."""
        needing = [s for s in block if not isinstance(s, DEFINITIONS) and self.needs_init(file, s)]
        if len(needing) == 1 and isinstance(needing[0], (ast.Expr, ast.Assign)):
            value = needing[0].value
            if isinstance(value, ast.Call):
                nested = [c for c in walk(value) if isinstance(c, ast.Call) and c is not value]
                called = self._functions_run(file, value)
                if len(called) == 1 and called[0].file is file:
                    if not any(self._call_needs(file, call) for call in nested):
                        return self._descend(file, called[0].node.body)
        return block

    def _functions_run(self, file: File, call: ast.Call) -> list[FunctionInfo]:
        """Functions that a call runs: ``main()``; ``Fire(main)``, ``run(main)``; ``cli()`` with ``@cli.command()``."""
        found = self.project.resolve(file, call.func)
        if isinstance(found, FunctionInfo):
            return [found]
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        given = [item for part in given for item in (part.values if isinstance(part, ast.Dict) else [part])]
        passed = [self.project.resolve(file, item) for item in given if isinstance(item, ast.Name)]
        functions = [item for item in passed if isinstance(item, FunctionInfo)]
        if not functions and isinstance(call.func, ast.Name) and not call.args:
            functions = [
                file.function_info(item)
                for item in file.tree.body
                if isinstance(item, ast.FunctionDef)
                and any(
                    (dotted(d.func if isinstance(d, ast.Call) else d) or "").split(".")[0] == call.func.id
                    for d in item.decorator_list
                )
            ]
        return functions if isinstance(found, External) or not call.args else []

    def constructs(self, file: File, node: ast.AST) -> bool:
        for item in walk_own(node):
            if self._takes_by_name(file, item) or self._reads_model(file, item):
                return True
            if isinstance(item, ast.Call) and any(self._makes(found) for found in self._called(file, item.func)):
                return True
            if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute):
                found = self.project.resolve(file, item.func)
                if not isinstance(found, (ClassInfo, FunctionInfo)):
                    if self._makes(self.project.resolve(file, item.func.value)):  # Net.load(path)
                        return True
        return False

    def _makes(self, found: Resolved) -> bool:
        """Whether a call of something makes a model."""
        if isinstance(found, ClassInfo):
            if self.classes.is_module(found):
                return True
            methods = found.methods.values() if found.node not in self._registries().owners else ()
            return any(self._function_constructs(found.file, method) for method in methods)
        return isinstance(found, FunctionInfo) and self._function_constructs(found.file, found.node)

    def _takes_by_name(self, file: File, node: ast.AST) -> bool:
        """Whether a model's class is found by a name that the code does not have: ``MODELS[name](8)``.

        So is one of several things under a name, ``MODELS[name][1]``, one that a method makes a model of,
        ``MODELS[name].from_pretrained(path)``, and one that a registry makes, ``MODELS.build(options)``.
        """
        taken: ast.expr | None = None
        if isinstance(node, ast.Call):
            taken = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        elif isinstance(node, ast.Assign):
            taken = node.value
        while isinstance(taken, ast.Subscript) and isinstance(taken.value, (ast.Subscript, ast.Call)):
            if _names_table(taken.value):
                break
            taken = taken.value
        match taken:
            case (
                ast.Subscript(value=ast.Attribute(value=holder, attr="__dict__"))
                | ast.Subscript(value=ast.Call(func=ast.Name(id="vars"), args=[holder]))
                | ast.Call(func=ast.Name(id="getattr"), args=[holder, *_])
            ):
                found = self.project.resolve(file, holder)
                return isinstance(found, ModuleRef) and self._holds_models(found.file)
            case (
                ast.Subscript(value=ast.Call(func=ast.Name(id="globals" | "locals")))
                | ast.Call(func=ast.Name(id="eval"), args=[_])
            ):
                return self._holds_models(file)
            case (
                ast.Subscript(value=(ast.Name() | ast.Attribute() | ast.Dict()) as holder)
                | ast.Call(func=ast.Attribute(value=(ast.Name() | ast.Attribute() | ast.Dict()) as holder, attr="get"))
            ):
                return self._is_registry(file, holder) or any(
                    self._is_chosen(self.project.resolve(other, choice))
                    for other, table in self._tables(file, holder)
                    for choice in held_in(table)
                )
            case ast.Name() | ast.Attribute() if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                return taken is node.func.value and node.func.attr not in _KEEPING and self._is_registry(file, taken)
        return False

    def _is_chosen(self, choice: Resolved) -> bool:
        return self._holds_models(choice.file) if isinstance(choice, ModuleRef) else self._is_model(choice)

    def _reads_model(self, file: File, node: ast.AST) -> bool:
        """Whether a whole model comes out of a file: ``model = torch.load(path)["model"]``, and ``model.eval()``."""
        if not isinstance(node, ast.Assign) or b"torch.load" not in file.source.data:
            return False
        roles = self.roles[file]
        made, evaluated = node.value, any(roles.var(target) in self._evaluated(file) for target in node.targets)
        while True:
            match made:
                case ast.Call(func=func) if self.project.external(file, func) == "torch.load":
                    return evaluated
                case ast.Call(func=ast.Attribute(value=made, attr=method)):
                    evaluated |= method == "eval"
                case ast.Subscript(value=made):
                    pass
                case ast.Name():
                    read = (value for v, value, _, _ in roles.assignments if v == roles.var(made))
                    calls = (value.func for value in read if isinstance(value, ast.Call))
                    return evaluated and any(self.project.external(file, func) == "torch.load" for func in calls)
                case _:
                    return False

    def _evaluated(self, file: File) -> set[Var]:
        """What is told that it is to evaluate, as no other than a model is."""
        if file not in self._told:
            calls = (call.func for call in file.calls if not call.args and isinstance(call.func, ast.Attribute))
            told = (self.roles[file].var(func.value) for func in calls if func.attr == "eval")
            self._told[file] = {variable for variable in told if variable is not None}
        return self._told[file]

    def _tables(self, file: File, node: ast.expr) -> Iterator[tuple[File, ast.Dict]]:
        """The dictionaries that a name, or a name of a module of the project, may stand for, each with its file."""
        if isinstance(node, ast.Dict):
            yield file, node
        for other, _, bindings in self._bindings(file, node):
            for binding in bindings:
                statement = other.names.parents.get(binding.node)
                if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Dict):
                    yield other, statement.value

    def _bindings(self, file: File, node: ast.expr) -> Iterator[tuple[File, str, list[Binding]]]:
        """Where a name is bound: here, and in the files that it is imported from, the last of which makes it."""
        name = node.id if isinstance(node, ast.Name) else ""
        if isinstance(node, ast.Attribute):
            owner = self.project.resolve(file, node.value)
            if not isinstance(owner, ModuleRef):
                return
            file, name, scope = owner.file, node.attr, owner.file.names.module
        else:
            scope = file.names.scope_of(node)
        for _ in range(3):
            found = file.names.lookup(name, scope)
            if found is None:
                return
            yield file, name, found[1]
            sources: list[tuple[File, str]] = []
            for binding in found[1]:
                if isinstance(binding.value, Import) and binding.value.name:
                    module = self.project.find_module(binding.value.module, file, binding.value.level)
                    sources += [(module, binding.value.name)] if module is not None else []
            if not sources:
                return
            (file, name), scope = sources[0], sources[0][0].names.module

    def _is_registry(self, file: File, node: ast.expr) -> bool:
        """Whether models of the project are put under names of their own into what a node stands for."""
        owner = file.names.class_of(node)
        if isinstance(node, ast.Attribute) and dotted(node.value) in {"self", "cls"} and owner is not None:
            return owner in self._registries().owners
        known = self._registries()
        found = list(self._bindings(file, node)) if known.names or known.files else []
        if not found:
            return False
        made, name, _ = found[-1]
        return (made, name) in known.names or (
            made in known.files and any(_keeps(made, item, name) for item in made.nodes)
        )

    def _registries(self) -> Registered:
        """Where models are registered: by decorators (``@register("net")``), and by ``MODELS["net"] = Net``."""
        if self._found is not None:
            return self._found
        found = self._found = Registered(set(), set(), set())
        for file in self.project:
            for node in file.nodes:
                match node:
                    case ast.ClassDef(decorator_list=[_, *_]) if self.classes.is_module(file.class_info(node)):
                        self._decorated(file, node.decorator_list, found)
                    case ast.FunctionDef(decorator_list=[_, *_]) if file.names.class_of(
                        node
                    ) is None and self._function_constructs(file, node):
                        self._decorated(file, node.decorator_list, found)
                    case ast.Assign(targets=[ast.Subscript(value=table)], value=(ast.Name() | ast.Attribute()) as kept):
                        if self._is_model(self.project.resolve(file, kept)):
                            found.names.update((other, name) for other, name, _ in self._bindings(file, table))
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name() as table, attr="update" | "register"), args=given
                    ):
                        values = [item for part in given for item in held_in(part)]
                        values += [item for keyword in node.keywords for item in held_in(keyword.value)]
                        if any(self._is_model(self.project.resolve(file, item)) for item in values):
                            found.names.update((other, name) for other, name, _ in self._bindings(file, table))
        return found

    def _decorated(self, file: File, decorators: list[ast.expr], found: Registered) -> None:
        for decorator in decorators:
            by = decorator.func if isinstance(decorator, ast.Call) else decorator
            called = self.project.resolve(file, by)
            if isinstance(called, FunctionInfo):
                owner = called.file.names.class_of(called.node)
                found.owners.update([owner] if owner is not None else [])
                found.files.update([called.file] if owner is None else [])
                continue
            holder = by.value if isinstance(by, ast.Attribute) else by
            kind = self.project.resolve(file, holder)
            if isinstance(kind, ClassInfo):
                found.owners.add(kind.node)
            for other, name, bindings in self._bindings(file, holder):
                found.names.add((other, name))
                for binding in bindings:
                    statement = other.names.parents.get(binding.node)
                    made = statement.value if isinstance(statement, (ast.Assign, ast.AnnAssign)) else None
                    kind = self.project.resolve(other, made.func) if isinstance(made, ast.Call) else None
                    if isinstance(kind, ClassInfo):
                        found.owners.add(kind.node)

    def _holds_models(self, file: File, deep: int = 0) -> bool:
        """Whether a name of a module is a model, or a function that makes one."""
        if file not in self._models:
            self._models[file] = False
            module = file.names.module
            self._models[file] = any(self._is_model(self.project.member(file, name)) for name in module.bindings)
            for star in module.stars if not self._models[file] else ():
                other = self.project.find_module(star.module, file, star.level)
                if other is not None and deep < 3 and self._holds_models(other, deep + 1):
                    self._models[file] = True
        return self._models[file]

    def _is_model(self, found: Resolved) -> bool:
        """Whether something is a class of models, or makes one, or trains one."""
        if isinstance(found, ClassInfo):
            return self.classes.is_module(found) or self._class_trains(found)
        if not isinstance(found, FunctionInfo):
            return False
        return self._function_constructs(found.file, found.node) or self._function_trains(found.file, found.node)

    def _class_trains(self, found: ClassInfo) -> bool:
        family = (found, *self.classes.ancestors(found))
        return any(self._function_trains(info.file, method) for info in family for method in info.methods.values())

    def _called(self, file: File, func: ast.expr) -> list[Resolved]:
        """What a call may call, also by a name that is one thing or another: ``Exp = A if x else B``."""
        found = self.project.resolve(file, func)
        if found is not None or not isinstance(func, ast.Name):
            return [found]
        values = file.names.values_of(func)
        parts = [part for v in values for part in ((v.body, v.orelse) if isinstance(v, ast.IfExp) else (v,))]
        return [self.project.resolve(file, part) for part in parts if isinstance(part, (ast.Name, ast.Attribute))]

    def _function_constructs(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        return self._constructing(node, lambda: any(self.constructs(file, statement) for statement in node.body))

    def needs_init(self, file: File, statement: ast.AST) -> bool:
        """Whether a statement must come after ``init_distributed`` (models, output, seeds, anything about ranks)."""
        roles = self.roles[file]
        held = roles.scalers | {(scope, path.split(".")[0]) for scope, path in roles.optimizers}
        for node in walk_own(statement):
            if isinstance(node, ast.Call) and (self._call_needs(file, node) or self._takes_by_name(file, node)):
                return True
            if self._reads_model(file, node):
                return True
            if isinstance(node, ast.Assign) and any(roles.var(target) in held for target in node.targets):
                return True
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if any(roles.var(target) in roles.models for target in node.targets):
                    return True
        return False

    def _call_needs(self, file: File, call: ast.Call) -> bool:
        called = self._called(file, call.func)
        for found in called:
            if isinstance(found, ClassInfo):
                if self.classes.is_module(found):
                    return True
                methods = found.methods.values() if found.node not in self._registries().owners else ()
                if any(self._function_needs(found.file, method) for method in methods):
                    return True
            if isinstance(found, FunctionInfo) and self._function_needs(found.file, found.node):
                return True
        if any(isinstance(found, (ClassInfo, FunctionInfo)) for found in called):
            return False
        found = called[0] if called else None
        if any(self._function_needs(run.file, run.node) for run in self._functions_run(file, call)):
            return True
        if isinstance(found, External):
            name = found.name
            return (
                name in SEEDS
                or name in _NEEDS
                or (name.startswith(("torch.distributed.", "bmtrain.")) and name not in _KNOWN_BEFORE)
                or is_optimizer_name(name)
                or external_kind(name) == "leaf"
                or name.split(".")[0] in {"tqdm", "wandb"}
                or name in WRITERS
                or (name in _DRAWS and not any(keyword.arg in _GIVEN_SEED for keyword in call.keywords))
            )
        if isinstance(call.func, ast.Attribute) and call.func.attr in WRITING_METHODS:
            return True
        if isinstance(call.func, ast.Name) and call.func.id == "print":
            return file.names.lookup("print", file.names.scope_of(call)) is None
        return False

    def makes_files(self, file: File, statement: ast.AST) -> bool:
        """Whether a statement opens a file to write, makes a folder, or runs a command, itself or in a function."""
        for call in (node for node in walk_own(statement) if isinstance(node, ast.Call)):
            if self.project.external(file, call.func) in COMMANDS:
                return True
            if opens_for_writing(call) or log_file(file, self.project, call) is not None:
                return True
            if fails_if_there(file, self.project, call):
                if not is_asked_for(file, call) or done_when_made(file, self.project, call) is not None:
                    return True
            found = self.project.resolve(file, call.func)
            if isinstance(found, ClassInfo) and "__init__" in found.methods:
                found = found.file.function_info(found.methods["__init__"])
            if isinstance(found, FunctionInfo) and self._function_makes_files(found):
                return True
        return False

    def _function_makes_files(self, function: FunctionInfo) -> bool:
        body = function.node.body
        return self._files(function.node, lambda: any(self.makes_files(function.file, inner) for inner in body))

    def _function_needs(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        return self._needs(node, lambda: any(self.needs_init(file, statement) for statement in node.body))

    def trains(self, file: File, statements: list[ast.stmt]) -> bool:
        """Whether a module's own statements train, or call what does: then it is a script, wherever it lies."""
        return any(
            isinstance(node, ast.Call) and self._call_trains(file, node)
            for statement in statements
            for node in walk_own(statement)
        )

    def _call_trains(self, file: File, call: ast.Call) -> bool:
        if is_backward(call):
            return True
        return any(
            self._class_trains(found)
            if isinstance(found, ClassInfo)
            else isinstance(found, FunctionInfo) and self._function_trains(found.file, found.node)
            for found in self._called(file, call.func)
        )

    def _function_trains(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        return self._backward(node, lambda: self.trains(file, node.body))


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


def _names_table(node: ast.expr) -> bool:
    """``vars(module)``, ``globals()``, ``locals()``: what is found in it by a name is a thing itself."""
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"vars", "globals", "locals"}
    )


def _keeps(file: File, node: ast.AST, name: str) -> bool:
    """``MODELS[key] = cls``, in a function that registers what it is given."""
    match node:
        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=table))], value=ast.Name(id=kept)) if table == name:
            function = file.names.function_of(node)
            return function is not None and kept in file.function_info(function).parameters
    return False


def is_main_test(node: ast.AST) -> TypeGuard[ast.If]:
    """``if __name__ == "__main__":``."""
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Compare):
        return False
    sides = (node.test.left, *node.test.comparators)
    return any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides) and any(
        isinstance(side, ast.Constant) and side.value == "__main__" for side in sides
    )


def _reads_arguments(function: ast.FunctionDef) -> bool:
    """Whether a function parses the command line: then an installed command calls it."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "parse_args"
        and not (node.args or node.keywords)
        for statement in function.body
        for node in walk_own(statement)
    )
