"""Which OptimManager steps which optimizer: existing ones, gradient scalers turned managers, and new ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk_own
from rewriter.analyze.training.roles import Roles, Var

_SCALER_METHODS = {
    "scale", "step", "update", "unscale_", "get_scale", "is_enabled", "state_dict", "load_state_dict",
}  # fmt: skip


@dataclass(eq=False)
class Manager:
    """``name`` as written in the code; the scaler it replaces, if any; the optimizers it steps."""

    name: str
    optimizers: list[Var] = field(default_factory=list)
    scaler: Var | None = None
    several: Var | None = None
    """The list or dict in which the optimizers are that it steps."""
    existing: bool = False


class Managers:
    """The managers of one file."""

    def __init__(self, file: File, roles: Roles) -> None:
        self.file = file
        self.roles = roles
        self.all: list[Manager] = []
        self.of: dict[Var, Manager] = {}
        self._existing()
        if not any(manager.existing for manager in self.all):
            self._from_scalers()
            self._from_lists()
            self._new()

    def _existing(self) -> None:
        for variable in self.roles.managers:
            manager = Manager(variable[1], existing=True)
            self.all.append(manager)
            self.of[variable] = manager

    def _from_scalers(self) -> None:
        for scaler in sorted(self.roles.scalers, key=_position):
            manager = Manager(self._scaler_name(scaler), scaler=scaler)
            self.all.append(manager)
            self.of[scaler] = manager
            for node in self.file.nodes:
                found = _receiver(node, "step")
                if found is not None and self.roles.var(found[1]) == scaler and found[0].args:
                    stepped = self.roles.var(found[0].args[0])
                    if stepped is not None and stepped not in self.of:
                        manager.optimizers.append(stepped)
                        self.of[stepped] = manager
            if not manager.optimizers and not self.is_argument(scaler):
                # It is handed on with an optimizer that is made next to it.
                beside = [
                    v for v in sorted(self.roles.optimizers, key=_position) if v[0] is scaler[0] and v not in self.of
                ]
                manager.optimizers.extend(v for v in beside if not self.is_argument(v))
                self.of.update(dict.fromkeys(manager.optimizers, manager))

    def _from_lists(self) -> None:
        """One manager for all of a list of which a loop, or an index, steps each."""
        stepped = {node.func.value for node in self.file.calls if _receiver(node, "step")}  # type: ignore[attr-defined]
        by_list: dict[Var, list[ast.expr]] = {}
        for node in stepped:
            several = self.roles.list_of(node)
            if several is not None and self.roles.var(node) not in self.of:
                by_list.setdefault(several, []).append(node)
        for several in sorted(by_list, key=_position):
            alone = sum(other[0] is several[0] for other in by_list) == 1
            base = "optim_manager" if alone else several[1].split(".")[-1] + "_manager"
            manager = Manager(self._free(several, base), several=several)
            self.all.append(manager)
            items = {variable for node in by_list[several] if (variable := self.roles.var(node)) is not None}
            items |= self.roles.listed(several) & self.roles.optimizers
            items |= {v for v in self.roles.optimizers if v in self._loop_names(several)}
            self.of.update(dict.fromkeys({several, *items}, manager))

    def _loop_names(self, several: Var) -> set[Var]:
        """The names by which loops have a list's optimizers."""
        names = (node for node in self.file.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
        return {v for name in names if self.roles.list_of(name) == several and (v := self.roles.var(name)) is not None}

    def by(self, node: ast.expr) -> Manager | None:
        """The manager of the optimizer, or the scaler, that an expression is."""
        variable = self.roles.var(node)
        found = self.of.get(variable) if variable is not None else None
        if found is None and (several := self.roles.list_of(node)) is not None:
            found = self.of.get(several)
        return found

    def _scaler_name(self, scaler: Var) -> str:
        """The manager's name: the scaler's own where it is handed around, else ``optim_manager``."""
        for node in self.file.nodes:
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                if self.roles.var(node) == scaler:
                    parent = self.file.names.parents[node]
                    if not (isinstance(parent, ast.Attribute) and parent.attr in _SCALER_METHODS):
                        return scaler[1]
        if self.is_argument(scaler):
            return scaler[1]
        alone = sum(other[0] is scaler[0] for other in self.roles.scalers) == 1
        return self._free(scaler, "optim_manager" if alone else scaler[1].split(".")[-1] + "_manager")

    def is_argument(self, variable: Var) -> bool:
        """Whether a variable is a function's argument."""
        scope = self.file.names.scopes.get(variable[0])
        return scope is not None and any(isinstance(b.node, ast.arg) for b in scope.bindings.get(variable[1], []))

    def _new(self) -> None:
        fresh = [v for v in sorted(self.roles.optimizers, key=_position) if v not in self.of and self._used(v)]
        for variable in fresh:
            lists = [manager.several for manager in self.all if manager.several is not None]
            alone = sum(other[0] is variable[0] for other in (*fresh, *lists)) == 1
            base = "optim_manager" if alone else variable[1].split(".")[-1] + "_manager"
            manager = Manager(self._free(variable, base), [variable])
            self.all.append(manager)
            self.of[variable] = manager

    def _used(self, variable: Var) -> bool:
        """Whether the variable is stepped or cleared where it is visible, or backward runs there."""
        if self.roles.methods_called.get(variable, set()) & {"step", "zero_grad"}:
            return True
        return any(_receiver(node, "backward") is not None for node in walk_own(variable[0])) and not self.is_argument(
            variable
        )

    def _free(self, variable: Var, base: str) -> str:
        own = variable[1].split(".")[0] in {"self", "cls"}
        prefix = variable[1].rsplit(".", 1)[0] + "." if own else ""
        scope = self.file.names.scopes.get(variable[0])
        name = base
        while not prefix and scope is not None and name in scope.bindings:
            name += "_"
        return prefix + name

    def for_call(self, node: ast.AST) -> Manager | None:
        """The manager that code at a node sees: of the optimizer stepped next in the same function, or the only one."""
        seen = [manager for manager in self.all if self._visible(manager, node)]
        if len(seen) < 2:
            return seen[0] if seen else None
        line = getattr(node, "lineno", 0)
        following = [(step, manager) for manager in seen for step in self._steps(manager) if step >= line]
        return min(following, key=lambda pair: pair[0])[1] if following else seen[-1]

    def is_only(self, manager: Manager, node: ast.AST) -> bool:
        """Whether code at a node sees no other manager, and this one steps one optimizer."""
        others = any(self._visible(other, node) for other in self.all if other is not manager)
        return not others and manager.several is None and len(manager.optimizers) < 2

    def _visible(self, manager: Manager, node: ast.AST) -> bool:
        variables = [v for v, found in self.of.items() if found is manager]
        around = {node, *self.file.names.ancestors(node)}
        for owner in [item for item in around if isinstance(item, ast.ClassDef)]:
            around.update(info.node for info in self.roles.classes.ancestors(self.file.class_info(owner)))
        return any(variable[0] in around for variable in variables)

    def _steps(self, manager: Manager) -> Iterator[int]:
        for node in self.file.nodes:
            found = _receiver(node, "step")
            if found is not None and self.by(found[1]) is manager:
                yield found[0].lineno


def _receiver(node: ast.AST, method: str) -> tuple[ast.Call, ast.expr] | None:
    """The call and what it is called on, for ``x.method(...)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
        return node, node.func.value
    return None


def _position(variable: Var) -> tuple[int, str]:
    return getattr(variable[0], "lineno", 0), variable[1]
