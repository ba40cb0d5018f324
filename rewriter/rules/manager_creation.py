"""Where OptimManagers are made and told their optimizers: part of rule BMT022."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.managers import Manager, Managers
from rewriter.analyze.names import dotted, walk
from rewriter.analyze.project import File
from rewriter.analyze.roles import Var
from rewriter.types import Edit


def creation_edits(file: File, facts: Facts, managers: Managers, manager: Manager) -> Iterator[tuple[int, Edit]]:
    """Where a manager is made and told its optimizers: (line, edit)."""
    if manager.scaler is not None and managers.is_argument(manager.scaler):
        yield from _scaler_argument(file, facts, managers, manager)
        return
    if manager.scaler is not None:
        yield from _scaler_creation(file, facts, managers, manager)
    for optimizer in manager.optimizers:
        place = _last_assignment(file, managers, optimizer) or owner_place(file, managers, optimizer)
        add = f"{manager.name}.add_optimizer({optimizer[1]})"
        if manager.scaler is not None:
            yield from _joined(file, managers, manager, place, add)
            continue
        lines = [f"{manager.name} = {facts.alias(file)}.optim.OptimManager(loss_scale=None)", add]
        if place is not None:
            yield place.lineno, file.source.insert_after(place, lines)
        else:
            first = _first_statement(optimizer)
            if first is not None:
                if _may_be_none(optimizer):
                    lines[1:] = [f"if {optimizer[1]} is not None:", file.source.indent_unit + add]
                yield first.lineno, file.source.insert_before(first, lines)


def owner_place(file: File, managers: Managers, optimizer: Var) -> ast.stmt | None:
    """For ``trainer.optimizer``: the statement after which ``trainer`` certainly has it, if it is made here."""
    root = optimizer[0], optimizer[1].split(".")[0]
    if root[1] == optimizer[1] or root[1] in {"self", "cls"}:
        return None
    return _last_assignment(file, managers, root)


def _joined(
    file: File, managers: Managers, manager: Manager, place: ast.stmt | None, add: str
) -> Iterator[tuple[int, Edit]]:
    """Tell a manager its optimizer wherever the later of the two is made."""
    makers = [statement for statement, _ in _makers(managers, manager)]
    if place is None:
        return  # the optimizer comes from outside: whoever made it joins the two
    if any(made.lineno < place.lineno for made in makers):
        yield place.lineno, file.source.insert_after(place, [add])
    for made in makers:
        if made.lineno > place.lineno:
            yield made.lineno, file.source.insert_after(made, [add])


def _scaler_argument(file: File, facts: Facts, managers: Managers, manager: Manager) -> Iterator[tuple[int, Edit]]:
    """A function that may be given no scaler makes its own manager then."""
    assert manager.scaler is not None
    function, name = manager.scaler
    first = _first_statement(manager.scaler)
    given = [v for v in manager.optimizers if v[0] is function and managers.is_argument(v)]
    if first is None or not given or not any(_asks_for_none(node, name) for node in walk(function)):
        return
    unit = file.source.indent_unit
    lines = [f"if {name} is None:", f"{unit}{name} = {facts.alias(file)}.optim.OptimManager(loss_scale=None)"]
    lines += [f"{unit}{name}.add_optimizer({variable[1]})" for variable in given]
    yield first.lineno, file.source.insert_before(first, lines)


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


def _scaler_creation(file: File, facts: Facts, managers: Managers, manager: Manager) -> Iterator[tuple[int, Edit]]:
    source, roles = file.source, managers.roles
    for statement, value in _makers(managers, manager):
        call = roles.scaler_call(value)
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if roles.var(target) == manager.scaler and source.code(target) != manager.name:
                    yield statement.lineno, Edit(source.span(target), (manager.name,))
        if call is None:
            none = f"{facts.alias(file)}.optim.OptimManager(loss_scale=None)"
            yield statement.lineno, Edit(source.span(value), (none,))
            continue
        condition = [keyword.value for keyword in call.keywords if keyword.arg == "enabled"]
        start = next((source.code(k.value) for k in call.keywords if k.arg == "init_scale"), "2**16")
        options = _growth(file, call)
        head = f"{facts.alias(file)}.optim.OptimManager(loss_scale={start}"
        if isinstance(value, ast.IfExp):
            inverted = isinstance(value.body, ast.Constant)
            test = source.code(value.test)
            test = f"not ({test})" if inverted else test
            yield statement.lineno, Edit(source.span(value), (f"{head} if {test} else None{options})",))
        elif condition:
            text = (head + " if ", source.span(condition[0]), f" else None{options})")
            yield statement.lineno, Edit(source.span(call), text)
        else:
            yield statement.lineno, Edit(source.span(call), (f"{head}{options})",))


def _growth(file: File, call: ast.Call) -> str:
    names = {"growth_factor": "loss_scale_factor", "growth_interval": "loss_scale_steps"}
    return "".join(
        f", {names[keyword.arg]}={file.source.code(keyword.value)}" for keyword in call.keywords if keyword.arg in names
    )


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
