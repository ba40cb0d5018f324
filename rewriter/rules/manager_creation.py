"""Where OptimManagers are made and told their optimizers: part of rule BMT022."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.managers import Manager, Managers
from rewriter.analyze.training.roles import Var
from rewriter.changes import Change, insert_before, insert_behind, replace

UNSCALED = "{bmt}.optim.OptimManager(loss_scale=None)"
_GROWTH = {"growth_factor": "loss_scale_factor", "growth_interval": "loss_scale_steps"}
"""What torch's GradScaler and the manager call the same."""


def creation(file: File, managers: Managers, manager: Manager) -> Iterator[Change]:
    """Where a manager is made and told its optimizers."""
    if manager.scaler is not None and managers.is_argument(manager.scaler):
        yield from _scaler_argument(managers, manager)
        return
    if manager.scaler is not None:
        yield from _scaler_creation(file, managers, manager)
    for optimizer in manager.optimizers:
        place = _last_assignment(file, managers, optimizer) or owner_place(file, managers, optimizer)
        add = f"{manager.name}.add_optimizer({optimizer[1]})"
        if manager.scaler is not None:
            yield from _joined(managers, manager, place, add)
            continue
        lines = [f"{manager.name} = {UNSCALED}", add]
        if place is not None:
            yield insert_behind(place, *lines)
        else:
            first = _first_statement(optimizer)
            if first is not None:
                if _may_be_none(optimizer):
                    lines[1:] = [f"if {optimizer[1]} is not None:", f"    {add}"]
                yield insert_before(first, *lines)


def owner_place(file: File, managers: Managers, optimizer: Var) -> ast.stmt | None:
    """For ``trainer.optimizer``: the statement after which ``trainer`` certainly has it, if it is made here."""
    root = optimizer[0], optimizer[1].split(".")[0]
    if root[1] == optimizer[1] or root[1] in {"self", "cls"}:
        return None
    return _last_assignment(file, managers, root)


def _joined(managers: Managers, manager: Manager, place: ast.stmt | None, add: str) -> Iterator[Change]:
    """Tell a manager its optimizer wherever the later of the two is made."""
    makers = [statement for statement, _ in _makers(managers, manager)]
    if place is None:
        return  # the optimizer comes from outside: whoever made it joins the two
    if any(made.lineno < place.lineno for made in makers):
        yield insert_behind(place, add)
    for made in makers:
        if made.lineno > place.lineno:
            yield insert_behind(made, add)


def _scaler_argument(managers: Managers, manager: Manager) -> Iterator[Change]:
    """A function that may be given no scaler makes its own manager then."""
    assert manager.scaler is not None
    function, name = manager.scaler
    first = _first_statement(manager.scaler)
    given = [v for v in manager.optimizers if v[0] is function and managers.is_argument(v)]
    if first is None or not given or not any(_asks_for_none(node, name) for node in walk(function)):
        return
    lines = [f"if {name} is None:", f"    {name} = {UNSCALED}"]
    lines += [f"    {name}.add_optimizer({variable[1]})" for variable in given]
    yield insert_before(first, *lines)


def _may_be_none(variable: Var) -> bool:
    """Whether an argument is None by default, or the function asks whether it is."""
    function, name = variable
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults = dict(zip((a.arg for a in reversed(positional)), reversed(given.defaults), strict=False))
    defaults.update((a.arg, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is not None)
    return (name in defaults and _is_none(defaults[name])) or any(_asks_for_none(node, name) for node in walk(function))


def _asks_for_none(node: ast.AST, name: str) -> bool:
    if isinstance(node, (ast.If, ast.IfExp)):
        return dotted(node.test) == name
    return isinstance(node, ast.Compare) and dotted(node.left) == name and _is_none(node.comparators[0])


def _makers(managers: Managers, manager: Manager) -> Iterator[tuple[ast.stmt, ast.expr]]:
    """The statements that give the scaler's variable a scaler, or None."""
    for variable, value, statement, part in managers.roles.assignments:
        if (
            variable == manager.scaler
            and not part
            and (managers.roles.scaler_call(value) is not None or _is_none(value))
        ):
            yield statement, value


def scaler_is_made_here(managers: Managers, manager: Manager) -> bool:
    """Whether the file makes the scaler."""
    return any(managers.roles.scaler_call(value) is not None for _, value in _makers(managers, manager))


def _scaler_creation(file: File, managers: Managers, manager: Manager) -> Iterator[Change]:
    roles = managers.roles
    for statement, value in _makers(managers, manager):
        call = roles.scaler_call(value)
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if roles.var(target) == manager.scaler and file.source.code(target) != manager.name:
                    yield replace(target, manager.name)
        if call is None:
            yield replace(value, UNSCALED)
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        scale = "{init_scale}" if "init_scale" in given else "2**16"
        place: ast.expr = call
        if isinstance(value, ast.IfExp):
            place, given["enabled"] = value, value.test
            inverted = isinstance(value.body, ast.Constant)
            scale += " if not {enabled} else None" if inverted else " if {enabled} else None"
        elif "enabled" in given:
            scale += " if {enabled} else None"
        options = [f"{new}={{{old}}}" for old, new in _GROWTH.items() if old in given]
        used = {name: node for name, node in given.items() if name in {"init_scale", "enabled", *_GROWTH}}
        yield replace(place, f"{{bmt}}.optim.OptimManager({', '.join([f'loss_scale={scale}', *options])})", **used)


def _last_assignment(file: File, managers: Managers, variable: Var) -> ast.stmt | None:
    """The statement after which a variable certainly has its value, seen from the block it is used in."""
    found = [s for v, value, s, _ in managers.roles.assignments if v == variable and not _is_none(value)]
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    chains = [[s, *(a for a in file.names.ancestors(s) if isinstance(a, ast.stmt))] for s in found]
    common = [item for item in chains[0] if all(item in chain for chain in chains[1:])]
    owner: ast.AST = common[0] if common else file.tree
    if isinstance(owner, ast.If):
        return owner
    inside = [item for item in chains[-1] if file.names.parents.get(item) is owner]
    return inside[0] if inside else found[-1]


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _first_statement(variable: Var) -> ast.stmt | None:
    """The first statement of the function whose argument the variable is."""
    owner = variable[0]
    if not isinstance(owner, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    body = owner.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1
    return body[1] if documented else body[0]
