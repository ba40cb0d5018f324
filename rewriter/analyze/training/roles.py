"""Which variables of a script are its models, optimizers, scalers, schedulers and losses."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from rewriter.analyze.read.classes import Classes, external_kind
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo
from rewriter.analyze.read.nodes import all_arguments, dotted, loss_of, reduction_of, walk, walk_own
from rewriter.analyze.read.project import Project

Var = tuple[ast.AST, str]
_MODEL_NAMES = re.compile(
    r"^(?:raw_|base_|unwrapped_|ddp_|ema_)?(?:model|net|network|generator|discriminator)(?:_\w+)?$", re.I
)
_PLAIN_TYPES = {"str", "int", "bool", "float", "Path", "PathLike", "os"}
_MODEL_ITSELF = re.compile(r"^(?:raw_|base_|unwrapped_|ddp_|ema_)?(?:model|net|network|generator|discriminator)$", re.I)
LOSS_CALL = re.compile(r"loss|criterion|^crit$|cross_entropy|nll|mse|objective", re.I)
_OWN_STEP = re.compile(r"self\.\w*opt\w*\.step$", re.I)
_DEEP = 3
_SCHEDULES = re.compile(r"sched|warm_?up|lr|scaler|anneal|profil", re.I)
_REDUCTIONS = {"mean", "sum", "float", "double", "to", "squeeze", "backward", "detach", "clone", "cpu"}
_WRAPPERS = {
    "torch.compile", "torch.nn.parallel.DistributedDataParallel", "torch.nn.DataParallel", "bmtrain.compile",
    "bmtrain.BMTrainModelWrapper",
}  # fmt: skip
_UNWRAPS = re.compile(r"unwrap|de_parallel|deparallel|unparallel|without_ddp|bare_model", re.I)
_CHAINED = {"to", "cuda", "cpu", "train", "eval", "half", "float", "bfloat16", "double", "requires_grad_"}


class Roles:
    """Roles of the variables of one file. A variable is a name in its scope, or ``self.name`` in its class."""

    def __init__(
        self,
        file: File,
        classes: Classes,
        class_held: Callable[[File, Var], ClassInfo | None] | None = None,
        others: Mapping[File, Roles] | None = None,
    ) -> None:
        self.file = file
        self.classes = classes
        self.project = classes.project
        self._class_held = class_held if class_held is not None else lambda file, variable: None
        self._others = others
        self._vars: dict[ast.AST, Var | None] = {}

    def var(self, node: ast.AST) -> Var | None:
        """The variable that a name, or an attribute of a name, stands for."""
        if node not in self._vars:
            self._vars[node] = self._find_var(node)
        return self._vars[node]

    def _find_var(self, node: ast.AST) -> Var | None:
        path = dotted(node)
        if path is None:
            return None
        root = path.split(".")[0]
        names = self.file.names
        if root in {"self", "cls"} and "." in path:
            owner = names.class_of(node)
            if owner is not None:
                return self._setter(owner, path.split(".")[1]), path
        found = names.lookup(root, names.scope_of(node))
        return (found[0].node if found else names.module.node), path

    def _setter(self, owner: ast.ClassDef, name: str) -> ast.ClassDef:
        """The class whose attribute ``self.name`` is: the one itself, or one above it in this file that sets it."""
        if (owner, name) in self._set:
            return owner
        above = self.classes.ancestors(self.file.class_info(owner))
        found = (info.node for info in above if info.file is self.file and (info.node, name) in self._set)
        return next(found, owner)

    @cached_property
    def _set(self) -> set[tuple[ast.ClassDef, str]]:
        """Each class, with the attributes of its objects that it sets."""
        return {
            (owner, node.attr)
            for node in self.file.nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            and (owner := self.file.names.class_of(node)) is not None
        }  # fmt: skip

    @cached_property
    def assignments(self) -> list[tuple[Var, ast.expr, ast.stmt, bool]]:
        """(variable, value, statement, whether the variable gets only a part of the value)."""
        found: list[tuple[Var, ast.expr, ast.stmt, bool]] = []
        for node in self.file.nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
                    for part in parts:
                        variable = self.var(part)
                        if variable is not None:
                            found.append((variable, node.value, node, part is not target))
        return found

    @cached_property
    def _assigned(self) -> dict[Var, list[tuple[ast.expr, ast.stmt, bool]]]:
        found: dict[Var, list[tuple[ast.expr, ast.stmt, bool]]] = {}
        for variable, value, statement, part in self.assignments:
            found.setdefault(variable, []).append((value, statement, part))
        return found

    def assigned(self, variable: Var | None) -> Sequence[tuple[ast.expr, ast.stmt, bool]]:
        """``assignments`` to one variable: value, statement, whether it gets only a part of the value."""
        return self._assigned.get(variable, ()) if variable is not None else ()

    @cached_property
    def augmented(self) -> dict[Var, list[ast.AugAssign]]:
        """The statements ``x += y`` that change a variable."""
        found: dict[Var, list[ast.AugAssign]] = {}
        for node in self.file.nodes:
            if isinstance(node, ast.AugAssign) and (variable := self.var(node.target)) is not None:
                found.setdefault(variable, []).append(node)
        return found

    @cached_property
    def _paired(self) -> list[tuple[Var, ast.expr]]:
        """``self.model, self.optimizer = model, optimizer``: each variable with its own value."""
        found: list[tuple[Var, ast.expr]] = []
        for node in self.file.nodes:
            match node:
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                    pairs = zip(targets, values, strict=False) if len(targets) == len(values) else ()
                    found += [
                        (variable, value) for target, value in pairs if (variable := self.var(target)) is not None
                    ]
        return found

    @cached_property
    def methods_called(self) -> dict[Var, set[str]]:
        found: dict[Var, set[str]] = {}
        for node in self.file.calls:
            if isinstance(node.func, ast.Attribute):
                variable = self.var(node.func.value)
                if variable is not None:
                    found.setdefault(variable, set()).add(node.func.attr)
        for name, items in self._displayed.items():
            for item in items:
                if (variable := self.var(item)) is not None:
                    found.setdefault(variable, set()).update(found.get(name, set()))
        return found

    # Optimizers ------------------------------------------------------------------------------------------------

    @cached_property
    def optimizers(self) -> set[Var]:
        return self._named_optimizers - self.optimizer_holders

    @cached_property
    def optimizer_holders(self) -> set[Var]:
        """Variables with objects of the project's that step an optimizer inside: ``NoamOpt(Adam(...))``."""
        return {variable for variable in self._named_optimizers if self._holds_optimizer(variable)}

    @cached_property
    def steps(self) -> bool:
        """Whether an optimizer is used here, or an object that has one is made here."""
        made = (v for v, value, _, part in self.assignments if isinstance(value, ast.Call) and not part)
        return bool(self._named_optimizers or self.packaged or self.lists) or any(map(self._steps_inside, made))

    @cached_property
    def packaged(self) -> list[tuple[str, ast.Call]]:
        """Optimizers of other packages, by name, that make one inside: ``SAM(net.parameters(), torch.optim.SGD)``."""
        found: list[tuple[str, ast.Call]] = []
        for variable, value, _, part in self.assignments:
            if part or not isinstance(value, ast.Call):
                continue
            name = self.project.external(self.file, value.func)
            given = [*value.args, *(keyword.value for keyword in value.keywords)]
            stepped = any("step" in method for method in self.methods_called.get(variable, set()))
            if name and not name.startswith(("torch.", "bmtrain.")) and stepped:
                found += [(name, value)] if any(map(self._is_optimizer_class, given)) else []
        return found

    def _is_optimizer_class(self, node: ast.expr) -> bool:
        variable = self.var(node)
        named = [value for other, value, _, _ in self.assignments if variable is not None and other == variable]
        return any(is_optimizer_name(self.project.external(self.file, item)) for item in (node, *named))

    def _steps_inside(self, variable: Var) -> bool:
        """Whether a variable's object has a method with ``self.optimizer.step()``."""
        held = self._class_held(self.file, variable)
        if held is None or self.classes.is_module(held):
            return False
        return any(map(is_optimizer_name, self.classes.external_bases(held))) or any(
            isinstance(node, ast.Call) and _OWN_STEP.match(dotted(node.func) or "")
            for method in held.methods.values()
            for node in walk(method)
        )

    def _held_by(self, info: ClassInfo) -> set[str]:
        """The attributes of an optimizer of the project's (SAM, Lookahead) with the optimizer that it steps inside."""
        if not any(map(is_optimizer_name, self.classes.external_bases(info))):
            return set()
        return {
            path
            for above in (info, *self.classes.ancestors(info))
            for method in above.methods.values()
            for node in walk(method)
            if isinstance(node, ast.Call)
            and (path := (dotted(node.func) or "").removesuffix(".step")) != dotted(node.func)
            and path.startswith("self.")
            and path.count(".") == 1
            and not _SCHEDULES.search(path[5:])
        }

    def _holds_optimizer(self, variable: Var) -> bool:
        held = self._class_held(self.file, variable)
        if held is None:
            return False
        if not self.classes.external_bases(held) <= {"object", "abc.ABC"}:
            return bool(self._held_by(held))
        return self.classes.method(held, "step") is not None

    @cached_property
    def _named_optimizers(self) -> set[Var]:
        found = {v for v, value, _, part in self.assignments if not part and self._is_optimizer(value)}
        found |= {v for v, value in self._paired if self._is_optimizer(value)}
        found |= self._stepped_bare & {v for v, methods in self.methods_called.items() if "zero_grad" in methods}
        for variable, methods in self.methods_called.items():
            named = re.search(r"opt", variable[1].split(".")[-1], re.I)
            if (named and "zero_grad" in methods and ("step" in methods or self.scalers)) or (
                named and "step" in methods and "zero_grad" not in methods and "param_groups" not in methods
            ):
                found.add(variable)
        found |= {(info.node, path) for info in self.classes.all(self.file) for path in self._held_by(info)}
        for node in self.file.calls:
            if isinstance(node.func, ast.Attribute) and node.func.attr == "step":
                if node.args and self.var(node.func.value) in self.scalers:
                    stepped = self.var(node.args[0])
                    if stepped is not None:
                        found.add(stepped)
        for variable, given in self.handed_on:
            if given in found and "step" in self.methods_called.get(variable, set()):
                found.add(variable)
        for call in self.file.calls if self.scalers else ():
            found |= set(self._stepped_by_scaler(call))
        found -= self.managers | self.scalers
        return found - {name for name, items in self._displayed.items() if {self.var(item) for item in items} <= found}

    @cached_property
    def displayed(self) -> dict[Var, list[ast.expr]]:
        """``o`` of ``for o in (opt_a, opt_b): o.step()``, which is only cleared, stepped and asked for its groups,
        with these two.
        """
        return {v: held for v, held in self._displayed.items() if {self.var(item) for item in held} <= self.optimizers}

    @cached_property
    def _displayed(self) -> dict[Var, list[ast.expr]]:
        found: dict[Var, list[ast.expr]] = {}
        for loop in (node for node in self.file.nodes if isinstance(node, (ast.For, ast.comprehension))):
            for name, held in gone_through(loop.target, loop.iter, displays=True):
                variable = self.var(name)
                if isinstance(held, (ast.Tuple, ast.List)) and variable is not None:
                    found.setdefault(variable, []).extend(held.elts)
        for node in self.file.nodes:
            if isinstance(node, ast.Name) and (variable := self.var(node)) in found and variable is not None:
                if isinstance(node.ctx, ast.Load) and not self._is_what_managers_do(node):
                    del found[variable]
        assigned = {variable for variable, *_ in self.assignments}
        named = {v for v, held in found.items() if all(isinstance(one, (ast.Name, ast.Attribute)) for one in held)}
        return {v: found[v] for v in named - assigned}

    def _is_what_managers_do(self, node: ast.expr) -> bool:
        """Whether an optimizer is cleared or stepped, or asked for its groups."""
        parents = self.file.names.parents
        match parents[node]:
            case ast.Attribute(attr="param_groups", ctx=ast.Load()):
                return True
            case ast.Attribute(attr="zero_grad" | "step" as attr) as func:
                call = parents[func]
                return isinstance(call, ast.Call) and call.func is func and (attr == "zero_grad" or not call.args)
        return False

    def _stepped_by_scaler(self, call: ast.Call) -> Iterator[Var]:
        """What a call hands on beside a scaler that steps it in the function: ``fit(model, optimizer, scaler)``."""
        function = self.project.resolve(self.file, call.func)
        if isinstance(function, FunctionInfo):
            given = dict(function.given(call))
            scalers = {name for name, value in given.items() if self.var(value) in self.scalers}
            handed = (given[name] for name in _stepped_by(self.project, function, scalers) if name in given)
            yield from (variable for value in handed if (variable := self.var(value)) is not None)

    @cached_property
    def _stepped_bare(self) -> set[Var]:
        """Variables of any name whose ``step()`` is called without arguments, other than the project's modules."""
        modules = {
            v
            for v, value, _, part in self.assignments
            if not part
            and isinstance(value, ast.Call)
            and isinstance(found := self.project.resolve(self.file, value.func), ClassInfo)
            and self.classes.is_module(found)
        }
        called = {
            variable
            for node in self.file.calls
            if isinstance(node.func, ast.Attribute) and node.func.attr == "step" and not (node.args or node.keywords)
            and (variable := self.var(node.func.value)) is not None
        }  # fmt: skip
        return {v for v in called - modules if not _MODEL_NAMES.match(v[1].split(".")[-1]) and v[1] not in {"self"}}

    @cached_property
    def handed_on(self) -> list[tuple[Var, Var]]:
        """Arguments of this file's functions, each with a variable that a call here gives for it."""
        found: list[tuple[Var, Var]] = []
        for call in self.file.calls:
            function = self.project.resolve(self.file, call.func) if call.args or call.keywords else None
            if not isinstance(function, FunctionInfo) or function.file is not self.file:
                continue
            given = function.given(call)
            found += [((function.node, name), held) for name, value in given if (held := self.var(value)) is not None]
        return found

    def _is_optimizer(self, value: ast.expr) -> bool:
        if not isinstance(value, ast.Call):
            return False
        found = self.project.resolve(self.file, value.func)
        if isinstance(found, FunctionInfo):
            return any(
                isinstance(node, ast.Return)
                and isinstance(node.value, ast.Call)
                and is_optimizer_name(self.project.external(found.file, node.value.func))
                for node in walk(found.node)
            )
        return isinstance(found, External) and is_optimizer_name(found.name)

    # Lists of optimizers ---------------------------------------------------------------------------------------

    @cached_property
    def lists(self) -> set[Var]:
        """Variables with several optimizers, in a list, a tuple or a dict."""
        found = {v for v, value, _, part in self.assignments if not part and self._lists_optimizers(value)}
        found |= {variable for variable, item in self._put if self._is_one(item)} | self._gone_through
        for _ in range(_DEEP):
            found |= {to for to, given in self.handed_on if given in found}
            found |= {v for v, value, _, part in self.assignments if not part and self.var(value) in found}
        return found

    @cached_property
    def _put(self) -> list[tuple[Var, ast.expr]]:
        """What is put into lists and dicts: ``optimizers.append(Adam(...))``, ``optimizers["a"] = Adam(...)``."""
        found: list[tuple[Var, ast.expr]] = []
        for node in self.file.nodes:
            match node:
                case (
                    ast.Call(func=ast.Attribute(value=held, attr="append"), args=[item])
                    | ast.Assign(targets=[ast.Subscript(value=held)], value=item)
                ):
                    found += [(variable, item)] if (variable := self.var(held)) is not None else []
        return found

    @cached_property
    def _gone_through(self) -> set[Var]:
        """Variables that a loop goes through which clears and steps each item."""
        found: set[Var] = set()
        for node in self.file.nodes:
            if isinstance(node, (ast.For, ast.comprehension)):
                for name, held in gone_through(node.target, node.iter):
                    variable, several = self.var(name), self.var(held)
                    called = self.methods_called.get(variable, set()) if variable is not None else set()
                    if several is not None and {"step", "zero_grad"} <= called:
                        found.add(several)
        return found

    def holds_others(self, several: Var) -> bool:
        """Whether a list has something beside optimizers: ``{"model": net, "optimizer": optimizer}``."""
        return several not in self._gone_through and not all(map(self._is_one, self._items(several)))

    def list_of(self, node: ast.expr) -> Var | None:
        """The list that an expression is one optimizer of: ``optimizers[0]``, ``o`` of a loop over them."""
        if isinstance(node, ast.Subscript):
            variable = self.var(node.value)
            return variable if variable in self.lists else None
        if not isinstance(node, ast.Name) or not self.lists:
            return None
        for parent in self.file.names.ancestors(node):
            loops = [parent] if isinstance(parent, ast.For) else list(getattr(parent, "generators", ()))
            for loop in loops:
                for name, held in gone_through(loop.target, loop.iter):
                    if name.id == node.id and self.var(held) in self.lists:
                        return self.var(held)
        variable = self.var(node)
        given = [value for other, value, _, _ in self.assignments if other == variable]
        sources = {self.var(v.value if isinstance(v, ast.Subscript) else v) for v in given}
        return next(iter(sources)) if len(sources) == 1 and sources <= self.lists and variable not in sources else None

    def listed(self, several: Var) -> set[Var]:
        """The names that optimizers of a list have beside it."""
        return {named for item in self._items(several) if (named := self.var(item)) is not None}

    def _items(self, several: Var) -> list[ast.expr]:
        """What is written or put into a list."""
        items = [item for variable, item in self._put if variable == several]
        for variable, value, _, part in self.assignments:
            if variable == several and not part:
                items += value.values if isinstance(value, ast.Dict) else getattr(value, "elts", [])
        return items

    def _lists_optimizers(self, value: ast.expr, deep: int = 0) -> bool:
        match value:
            case ast.Name() if deep:
                held = [
                    given for variable, given, _, part in self.assignments if variable == self.var(value) and not part
                ]
                return deep < _DEEP and any(self._lists_optimizers(given, deep + 1) for given in held)
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Dict(values=items):
                return any(map(self._is_one, items))
            case ast.ListComp(elt=item) | ast.DictComp(value=item):
                return self._is_one(item)
            case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
                return any(self._is_one(keyword.value) for keyword in keywords)
            case ast.Call():
                found = self.project.resolve(self.file, value.func)
                if isinstance(found, FunctionInfo) and deep < _DEEP:
                    roles = self if self._others is None or found.file is self.file else self._others[found.file]
                    given = [node.value for node in walk(found.node) if isinstance(node, ast.Return) and node.value]
                    return any(roles._lists_optimizers(item, deep + 1) for item in given)
        return False

    def _is_one(self, value: ast.expr) -> bool:
        return self._is_optimizer(value) or self.var(value) in self._named_optimizers

    @cached_property
    def scalers(self) -> set[Var]:
        found = {v for v, value, _, part in self.assignments if not part and self.scaler_call(value) is not None}
        for variable, methods in self.methods_called.items():
            if {"scale", "step"} <= methods and methods & {"unscale_", "update"}:
                found.add(variable)
        return found

    def scaler_call(self, value: ast.expr) -> ast.Call | None:
        """The ``GradScaler(...)`` in a value that is one, or one or None."""
        if isinstance(value, ast.IfExp):
            return self.scaler_call(value.body) or self.scaler_call(value.orelse)
        if isinstance(value, ast.Call) and self.project.external(self.file, value.func) == "torch.amp.GradScaler":
            return value
        return None

    @cached_property
    def managers(self) -> set[Var]:
        """Variables that already hold an OptimManager, also where they are handed on."""
        found = {
            variable
            for variable, value, _, _ in self.assignments
            if isinstance(value, ast.Call)
            and self.project.external(self.file, value.func).startswith("bmtrain.optim.OptimManager")
        }
        names = {variable[1] for variable in found}
        for variable, methods in self.methods_called.items():
            if "backward" in methods and ("step" in methods or variable[1] in names):
                found.add(variable)
        return found

    # Models ----------------------------------------------------------------------------------------------------

    @cached_property
    def models(self) -> dict[Var, ClassInfo | None]:
        """Model variables and, where it is known, their class."""
        found: dict[Var, ClassInfo | None] = {}
        for variable, methods in self.methods_called.items():
            if methods & {"parameters", "named_parameters"} or (
                methods & {"train", "eval"} and methods & {"state_dict", "load_state_dict", "to"}
            ):
                found[variable] = None
        named = [node for node in self.file.nodes if isinstance(node, ast.Name) and _MODEL_NAMES.match(node.id)]
        arguments = {given for node in named if (given := self.var(node)) and self.is_argument(given)}
        arguments = {given for given in arguments if not self._is_plain_argument(given)}
        found.update((v, None) for v in arguments if v not in found and _MODEL_ITSELF.match(v[1]))
        for _ in range(4):
            before = len(found), sum(value is not None for value in found.values())
            for variable, value in (*((v, value) for v, value, _, part in self.assignments if not part), *self._paired):
                is_model, cls = self._model_value(value, found)
                if is_model:
                    found[variable] = cls or found.get(variable)
            if before == (len(found), sum(value is not None for value in found.values())):
                break
        for variable in arguments:
            found.setdefault(variable, None)
        return {variable: cls for variable, cls in found.items() if variable not in self.optimizers}

    def is_argument(self, variable: Var) -> bool:
        """Whether a variable is a function's argument."""
        scope = self.file.names.scopes.get(variable[0])
        return scope is not None and any(isinstance(b.node, ast.arg) for b in scope.bindings.get(variable[1], []))

    def _is_plain_argument(self, variable: Var) -> bool:
        """Whether an argument is said to be a text, a path or a number: the name of a model, not one."""
        if not isinstance(variable[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
            return False
        own = variable[0].args
        listed = [*own.posonlyargs, *own.args]
        defaults = dict(zip([arg.arg for arg in reversed(listed)], reversed(own.defaults), strict=False))
        defaults |= {arg.arg: value for arg, value in zip(own.kwonlyargs, own.kw_defaults, strict=True) if value}
        default = defaults.get(variable[1])
        if isinstance(default, ast.Constant) and isinstance(default.value, str):
            return True
        notes = [arg.annotation for arg in (*listed, *own.kwonlyargs) if arg.arg == variable[1] and arg.annotation]
        notes += [default] if isinstance(default, ast.Name) else []
        named = [{n.id for n in walk(note) if isinstance(n, ast.Name)} - {"Optional", "Union"} for note in notes]
        return any(names and names <= _PLAIN_TYPES for names in named)

    def _model_value(self, value: ast.expr, known: dict[Var, ClassInfo | None]) -> tuple[bool, ClassInfo | None]:
        """Whether an expression yields a model."""
        if isinstance(value, ast.IfExp):
            left, right = self._model_value(value.body, known), self._model_value(value.orelse, known)
            return left[0] or right[0], left[1] or right[1]
        if isinstance(value, (ast.Name, ast.Attribute)):
            if isinstance(value, ast.Attribute) and value.attr == "module":
                return self._model_value(value.value, known)
            variable = self.var(value)
            return variable in known, known.get(variable) if variable else None
        if not isinstance(value, ast.Call):
            return False, None
        if (inner := unwrapped(value)) is not None:
            return self._model_value(inner, known)
        found = self.project.resolve(self.file, value.func)
        if isinstance(found, ClassInfo):
            return self.classes.is_module(found) and not LOSS_CALL.search(found.name), found
        if isinstance(found, External) and found.name in _WRAPPERS and value.args:
            return self._model_value(value.args[0], known)
        if isinstance(found, External) and external_kind(found.name) == "leaf":
            return not LOSS_CALL.search(found.name), None
        if isinstance(value.func, ast.Attribute) and value.func.attr in _CHAINED:
            return self._model_value(value.func.value, known)
        return False, None

    def is_model(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == "module":
            return self.is_model(node.value)
        variable = self.var(node)
        return variable is not None and variable in self.models

    def model_class(self, node: ast.AST) -> ClassInfo | None:
        variable = self.var(node)
        return self.models.get(variable) if variable is not None else None

    def gives_parameters(self, call: ast.Call) -> bool:
        """Whether a call is given a model's parameters, ``ExponentialMovingAverage(model.parameters())``."""
        return any(
            isinstance(item, ast.Call)
            and isinstance(item.func, ast.Attribute)
            and item.func.attr in {"parameters", "named_parameters"}
            and self.is_model(item.func.value)
            for item in all_arguments(call)
        )

    # Losses ----------------------------------------------------------------------------------------------------

    @cached_property
    def losses(self) -> set[Var]:
        """Names that hold a loss tensor: they come out of a model or a loss function."""
        made = {variable for variable, *_ in self.assignments if "." not in variable[1]}
        found = {v for v in made if "backward" in self.methods_called.get(v, set())}
        for loss in filter(None, map(loss_of, self.file.calls)):
            found |= {v for name in self._terms(loss) if (v := self.var(name)) in made}
        for _ in range(3):
            for variable, value, _, part in self.assignments:
                if variable in found and not part and isinstance(value, ast.BinOp):
                    terms = {v for name in self._terms(value) if (v := self.var(name)) in made}
                    found |= {
                        v for v, made_of, _, cut in self.assignments if v in terms and self._loss_call(made_of, cut)
                    }
            for variable, value, _, part in self.assignments:
                if "." in variable[1] or isinstance(value, (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.ListComp)):
                    continue
                summed = isinstance(value, ast.BinOp) and not (
                    isinstance(value.op, ast.Pow) or self._has_entry(value)  # a power is no multiple
                )
                if "loss" in variable[1].lower() or summed or isinstance(value, ast.IfExp):
                    if self._loss_value(value, found, part):
                        found.add(variable)
                if not part and (self.gives_loss(value, found) or self._is_same_loss(value, found)):
                    found.add(variable)
            for node in self.file.nodes:
                found |= self._losses_in_tuple(node, found)
                if isinstance(node, ast.AugAssign) and (
                    self._loss_value(node.value, found, False) or self.gives_loss(node.value, found)
                ):
                    total = self.var(node.target)
                    if total is not None and "." not in total[1]:
                        found.add(total)
        return found - self.managers - (self._functions - self.trained) - self._of_items

    @cached_property
    def _criteria(self) -> set[Var]:
        """Names of torch's losses that give one number: ``l1 = nn.L1Loss()``."""
        return {
            variable
            for variable, value, _, part in self.assignments
            if not part and isinstance(value, ast.Call) and reduction_of(value) != "none"
            if (name := self.project.external(self.file, value.func)).startswith("torch.nn.") and name.endswith("Loss")
        }

    @cached_property
    def _of_items(self) -> set[Var]:
        """Names of the losses of each item: ``losses = F.cross_entropy(out, y, reduction="none")``."""
        made: dict[Var, list[ast.expr]] = {}
        for variable, value, _, part in self.assignments:
            if not part:
                made.setdefault(variable, []).append(value)

        def is_per_item(value: ast.expr) -> bool:
            if not isinstance(value, ast.Call):
                return False
            function = self.var(value.func)
            criteria = [value.func] if function is None else made.get(function, [])
            calls = [value, *(one for one in criteria if isinstance(one, ast.Call))]
            return any(reduction_of(call) == "none" for call in calls)

        return {variable for variable, values in made.items() if all(map(is_per_item, values))}

    def _is_same_loss(self, value: ast.expr, known: set[Var]) -> bool:
        """``last = loss``, ``last = loss.detach()`` of a loss that backward is called on."""
        while isinstance(value, (ast.Call, ast.Attribute)):
            inner = value.func if isinstance(value, ast.Call) else value
            if not isinstance(inner, ast.Attribute) or inner.attr not in {"detach", "clone", "cpu", "data"}:
                return False
            value = inner.value
        return isinstance(value, ast.Name) and self.var(value) in known & self.trained

    @cached_property
    def _functions(self) -> set[Var]:
        """Names that are called, here or in a function of the project that is given them: no loss is."""
        found = {v for call in self.file.calls if (v := self.var(call.func)) is not None}
        for call in self.file.calls:
            function = self.function_called(call.func)
            given = function.given(call) if function is not None else ()
            names = {name: v for name, value in given if (v := self.var(value)) is not None}
            if function is not None and names:
                inner = (item.func for item in walk(function.node) if isinstance(item, ast.Call))
                found |= {names[func.id] for func in inner if isinstance(func, ast.Name) and func.id in names}
        return found

    @cached_property
    def trained(self) -> set[Var]:
        """Names that backward is called on, or on something that is made of them."""
        held = [value for call in self.file.calls if (loss := loss_of(call)) for value in (loss, *call.args)]
        return {v for node in held for name in self._terms(node) if (v := self.var(name)) is not None} - self.managers

    @cached_property
    def loss_parts(self) -> set[str]:
        """``out["loss"]`` and ``out.loss``, as ``ast.dump`` gives them, where backward is called on them."""
        return {
            ast.dump(loss)
            for loss in map(loss_of, self.file.calls)
            if isinstance(loss, (ast.Subscript, ast.Attribute)) and self.var(loss) not in self.managers
        }

    @cached_property
    def loss_dicts(self) -> set[Var]:
        """Dicts of which backward is called on an entry, or on what the entries add up to."""
        found: set[Var | None] = set()
        for call in self.file.calls:
            match loss_of(call):
                case ast.Subscript(value=held, slice=ast.Constant(value=str())):
                    found.add(self.var(held))
        for item in (
            item for variable, value, _, _ in self.assignments if variable in self.trained for item in walk(value)
        ):
            match item:
                case ast.Call(func=ast.Name(id="sum"), args=[ast.Call(func=ast.Attribute(value=held, attr="values"))]):
                    found.add(self.var(held))
                case ast.Subscript(value=held, slice=ast.Constant(value=str())) if "loss" in ast.unparse(held).lower():
                    found.add(self.var(held))
        return {variable for variable in found if variable is not None}

    def _terms(self, node: ast.expr) -> Iterator[ast.Name]:
        """The losses that a sum, a part or a multiple of losses is made of, as far as names tell."""
        match node:
            case ast.Name():
                yield node
            case ast.BinOp(left=left, op=ast.Div()):
                yield from self._terms(left)
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
                yield from (*self._terms(left), *self._terms(right))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                both = [*self._terms(left), *self._terms(right)]
                alone = isinstance(left, ast.Constant) or isinstance(right, ast.Constant)
                yield from (name for name in both if alone or "loss" in name.id.lower())
            case ast.Call(func=ast.Attribute(value=scaler, attr="scale"), args=[loss]) if (
                self.var(scaler) in self.scalers
            ):
                yield from self._terms(loss)

    def _loss_call(self, value: ast.expr, part: bool) -> bool:
        """``F.cross_entropy(...)``, unless it may give more than one number."""
        return (
            isinstance(value, ast.Call)
            and all(keyword.arg != "reduction" for keyword in value.keywords)
            and self._loss_value(value, set(), part)
        )

    def _has_entry(self, value: ast.BinOp) -> bool:
        """Whether a side is a first entry, ``sizes[0] * 2``, ``splitext(path)[0] + ".pt"``, of what no model gives."""
        sides = (side.value for side in (value.left, value.right) if isinstance(side, ast.Subscript))
        return any(not (isinstance(whole, ast.Call) and self.is_model(whole.func)) for whole in sides)

    def _losses_in_tuple(self, node: ast.AST, known: set[Var]) -> set[Var]:
        """Losses among the names of ``loss, logits = step(batch)`` and ``for i, loss in steps_of(loader)``."""
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=call):
                kind: type[ast.Return | ast.Yield] = ast.Return
            case ast.For(target=ast.Tuple(elts=names), iter=call):
                kind = ast.Yield
            case ast.For(target=ast.Name() as name, iter=call) if self.gives_loss(call, known, ast.Yield):
                variable = self.var(name)
                return {variable} if variable is not None else set()
            case _:
                return set()
        places = enumerate(map(self.var, names))
        return {v for place, v in places if v is not None and self.gives_loss(call, known, kind, place)}

    def gives_loss(
        self,
        value: ast.expr,
        known: set[Var],
        kind: type[ast.Return | ast.Yield] = ast.Return,
        place: int | None = None,
    ) -> bool:
        """Whether a function or method of the project returns the loss that it has called backward on.

        Where it leaves early it may return None. ``place`` is the loss's in a tuple. So does an optimizer's step that
        is given such a function as its closure.
        """
        function = None
        match value:
            case ast.Call(func=ast.Attribute(value=stepped, attr="step"), args=[closure]) if (
                self.var(stepped) in self.optimizers
            ):
                function = self.function_called(closure)
            case ast.Call(func=func):
                function = self.function_called(func)
        if function is None or (function.file is not self.file and self._others is None):
            return False
        there = self if self._others is None or function.file is self.file else self._others[function.file]
        own = [item for statement in function.node.body for item in walk_own(statement)]
        if kind is ast.Return and any(isinstance(item, (ast.Yield, ast.YieldFrom)) for item in own):
            return False  # a generator is no loss
        given = [_part(item.value, place) for item in own if isinstance(item, kind) and not _is_nothing(item.value)]
        trained = {
            there.var(name) for item in own if (loss := loss_of(item)) is not None for name in there._terms(loss)
        }
        held = trained & known if there is self else trained
        return bool(given) and all(item is not None and there.var(_bare(item)) in held for item in given)

    def function_called(self, func: ast.expr) -> FunctionInfo | None:
        """The function of the project that a call runs, or the method of an object whose class is seen."""
        found = self.project.resolve(self.file, func)
        if isinstance(found, FunctionInfo) or not isinstance(func, ast.Attribute):
            return found if isinstance(found, FunctionInfo) else None
        owner = self.file.names.class_of(func) if getattr(func.value, "id", "") == "self" else None
        variable = self.var(func.value)
        held = self._class_held(self.file, variable) if owner is None and variable is not None else None
        cls = self.file.class_info(owner) if owner is not None else held
        method = self.classes.method(cls, func.attr) if cls is not None else None
        return method[0].file.function_info(method[1]) if method is not None else None

    def _makes_object(self, func: ast.expr) -> bool:
        """Whether a call makes an object of a class: ``nn.CrossEntropyLoss()``."""
        found = self.project.resolve(self.file, func)
        is_class = isinstance(found, External) and found.name.split(".")[-1][:1].isupper()
        return isinstance(found, ClassInfo) or is_class

    def _loss_value(self, value: ast.expr, known: set[Var], part: bool) -> bool:
        if isinstance(value, ast.BinOp):
            sides = (value.left, value.right)
            return any(self._loss_value(side, known, part) for side in sides) and not any(map(_is_number, sides))
        if isinstance(value, ast.IfExp):
            return all(self._loss_value(side, known, part) for side in (value.body, value.orelse))
        if isinstance(value, ast.Name):
            return self.var(value) in known
        if isinstance(value, ast.Call):
            if isinstance(value.func, ast.Attribute) and value.func.attr in {"item", "tolist"}:
                return False
            if self.is_model(value.func):
                return True
            if self._makes_object(value.func):
                return False
            if isinstance(value.func, ast.Attribute) and value.func.attr in _REDUCTIONS:
                return self._loss_value(value.func.value, known, part)
            if self.var(value.func) in self._criteria:
                return True
            made = value.func.func if isinstance(value.func, ast.Call) else value.func  # nn.MSELoss()(out, y)
            name = dotted(made) or ""
            return bool(LOSS_CALL.search(name.split(".")[-1])) and not name.split(".")[-1].startswith(
                ("estimate", "eval")
            )
        if isinstance(value, ast.Attribute):
            return value.attr == "loss" or (value.attr == "data" and self._loss_value(value.value, known, part))
        if isinstance(value, ast.Subscript):
            sizes = isinstance(value.value, ast.Attribute) and value.value.attr == "shape"
            constant = isinstance(value.slice, ast.Constant) and value.slice.value in {"loss", 0}
            return part is False and constant and not sizes
        return False


def _part(value: ast.expr | None, place: int | None) -> ast.expr | None:
    """What stands at a place of a tuple; the value itself without one."""
    if place is None:
        return value
    return value.elts[place] if isinstance(value, ast.Tuple) and place < len(value.elts) else None


def _bare(node: ast.expr) -> ast.expr:
    """The tensor under ``.detach()``, ``.data`` and the like."""
    while True:
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _REDUCTIONS:
                node = value
            case ast.Attribute(value=value, attr="data"):
                node = value
            case _:
                return node


def _stepped_by(project: Project, function: FunctionInfo, scalers: set[str], deep: int = 0) -> Iterator[str]:
    """The names of what scalers step in a function, and in those that it hands them on to."""
    for node in walk(function.node) if scalers and deep < _DEEP else ():
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr="step"), args=[ast.Name(id=stepped), *_]
            ) if name in scalers:
                yield stepped
            case ast.Call() if isinstance(found := project.resolve(function.file, node.func), FunctionInfo):
                given = {name: value.id for name, value in found.given(node) if isinstance(value, ast.Name)}
                handed = {name for name, value in given.items() if value in scalers}
                yield from (given[name] for name in _stepped_by(project, found, handed, deep + 1) if name in given)


def _is_nothing(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _is_number(node: ast.expr) -> bool:
    """Whether an expression holds a ``.item()``: with it a sum is no tensor, or not only of this rank."""
    return any(isinstance(item, ast.Attribute) and item.attr in {"item", "tolist"} for item in walk(node))


def gone_through(target: ast.expr, iterated: ast.expr, displays: bool = False) -> Iterator[tuple[ast.Name, ast.expr]]:
    """The names of a loop, each with the list or dict of which it is an item in turn; with ``displays`` ``(a, b)``."""
    held = (ast.Name, ast.Attribute, ast.Tuple, ast.List) if displays else (ast.Name, ast.Attribute)
    if isinstance(target, ast.Name) and isinstance(iterated, held):
        yield target, iterated
    if not isinstance(iterated, ast.Call):
        return
    called = iterated.func.attr if isinstance(iterated.func, ast.Attribute) else getattr(iterated.func, "id", "")
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    if isinstance(iterated.func, ast.Attribute) and called in {"values", "items"} and not iterated.args:
        if isinstance(parts[-1], ast.Name):
            yield parts[-1], iterated.func.value
    elif called in {"enumerate", "reversed", "sorted", "list", "tuple"} and iterated.args:
        yield from gone_through(parts[-1], iterated.args[0], displays)
    elif called == "zip" and len(parts) == len(iterated.args):
        for part, item in zip(parts, iterated.args, strict=True):
            yield from gone_through(part, item, displays)


def is_optimizer_name(name: str) -> bool:
    """Whether a dotted name is an optimizer class."""
    if name.startswith("torch.optim.") and not name.startswith("torch.optim.lr_scheduler"):
        last = name.split(".")[-1]
        return last[:1].isupper() and name.count(".") == 2
    return name.startswith("bmtrain.optim.") and name.endswith("Optimizer")


def unwrapped(value: ast.expr) -> ast.expr | None:
    """What a call takes a wrapper from: ``getattr(model, "module", model)``, ``unwrap_model(model)``."""
    match value:
        case ast.Call(func=ast.Name(id="getattr"), args=[model, ast.Constant(value="module"), _], keywords=[]):
            return model
        case ast.Call(func=function, args=[model]) if _UNWRAPS.search((dotted(function) or "").split(".")[-1]):
            return model
    return None
