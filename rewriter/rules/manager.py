"""An OptimManager runs backward, clips, steps and clears.

What: ``optim_manager = bmt.optim.OptimManager(loss_scale=None)`` behind the optimizer; a GradScaler becomes the manager
itself, with ``loss_scale=2**16``; ``backward``, ``clip_grad_norm_``, ``step`` and ``zero_grad`` go through it.
Why: the gradient of a rank is its share of the sum over all ranks; the manager makes it the mean, computes norms over
all shards, and scales the loss for fp16.
Refuses when: ``step`` gets a closure. A learning-rate scheduler that the script steps stays the script's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.managers import Manager, Managers
from rewriter.analyze.project import File
from rewriter.analyze.roles import Var
from rewriter.rules.manager_calls import call_edits
from rewriter.types import Edit, Example, Finding, Rule, Safety


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    managers = facts.managers(file)
    for manager in managers.all:
        reason = _reason_against(managers, manager)
        if reason:
            yield Finding(RULE.code, _first_use(file, managers, manager), reason, safety=Safety.REPORT, stop=True)
    edits: list[Edit] = []
    line = 0
    for manager in managers.all:
        if manager.existing:
            continue
        for place, edit in _creation(file, facts, managers, manager):
            line = line or place
            edits.append(edit)
    calls = list(call_edits(file, facts, managers))
    for call_line, message, stop in (item for item in calls if isinstance(item, tuple)):
        yield Finding(RULE.code, call_line, message, safety=Safety.REPORT, stop=stop)
    edits.extend(item for item in calls if isinstance(item, Edit))
    if edits:
        first = line or file.source.line_of(min(edit.span.start for edit in edits))
        yield Finding(RULE.code, first, "an OptimManager runs backward and steps", tuple(edits), key="manager")


def _reason_against(managers: Managers, manager: Manager) -> str:
    """Why a manager's optimizer or scaler is not understood well enough to convert the file."""
    if manager.existing:
        return ""
    for variable in (*manager.optimizers, *([manager.scaler] if manager.scaler else [])):
        path = variable[1]
        if "." in path and path.split(".")[0] not in {"self", "cls"}:
            return f"{path} belongs to another object, so where its manager would be made is not known"
        if not managers.is_argument(variable) and not any(v == variable for v, *_ in managers.roles.assignments):
            return f"{path} is not made in this file, so where its manager would be made is not known"
    if (
        manager.scaler is not None
        and _scaler_statement(managers, manager) is None
        and not managers.is_argument(manager.scaler)
    ):
        return f"{manager.scaler[1]} is no GradScaler made in this file"
    return ""


def _first_use(file: File, managers: Managers, manager: Manager) -> int:
    variables = {*manager.optimizers, manager.scaler}
    lines = [
        n.lineno for n in file.nodes if isinstance(n, (ast.Name, ast.Attribute)) and managers.roles.var(n) in variables
    ]
    return min(lines, default=1)


def _creation(file: File, facts: Facts, managers: Managers, manager: Manager) -> Iterator[tuple[int, Edit]]:
    """Where a manager is made and told its optimizers."""
    alias, source = facts.alias(file), file.source
    made = _scaler_statement(managers, manager)
    yield from _scaler_creation(file, facts, managers, manager)
    for optimizer in manager.optimizers:
        place = _last_assignment(file, managers, optimizer)
        add = f"{manager.name}.add_optimizer({optimizer[1]})"
        if manager.scaler is not None:
            if made is None or place is None:
                continue  # both come from outside: whoever made them joins them
            after = place if place.lineno > made.lineno else made
            yield after.lineno, source.insert_after(after, [add])
            continue
        lines = [f"{manager.name} = {alias}.optim.OptimManager(loss_scale=None)", add]
        if place is not None:
            yield place.lineno, source.insert_after(place, lines)
        else:
            first = _first_statement(optimizer)
            if first is not None:
                yield first.lineno, source.insert_before(first, lines)


def _scaler_statement(managers: Managers, manager: Manager) -> ast.stmt | None:
    """The statement that makes the scaler, if it is in this file."""
    for variable, value, statement, part in managers.roles.assignments:
        if variable == manager.scaler and not part and managers.roles.scaler_call(value) is not None:
            return statement
    return None


def _scaler_creation(file: File, facts: Facts, managers: Managers, manager: Manager) -> Iterator[tuple[int, Edit]]:
    source, roles = file.source, managers.roles
    for variable, value, statement, part in roles.assignments:
        call = roles.scaler_call(value)
        if variable != manager.scaler or part or call is None:
            continue
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if roles.var(target) == variable and variable[1] != manager.name:
                    yield statement.lineno, Edit(source.span(target), (manager.name,))
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
    return isinstance(value, ast.Constant)


def _first_statement(variable: Var) -> ast.stmt | None:
    """The first statement of the function whose argument the variable is."""
    owner = variable[0]
    if not isinstance(owner, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    body = owner.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1
    return body[1] if documented else body[0]


RULE = Rule(
    code="BMT022",
    title="an OptimManager runs backward, clips, steps and clears",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cuda", enabled=half)
for x in batches:
    loss = model(x).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=2**16 if half else None)
optim_manager.add_optimizer(optimizer)
for x in batches:
    loss = model(x).mean()
    optim_manager.backward(loss)
    optim_manager.clip_grad_norm(optimizer.param_groups, 1.0)
    optim_manager.step()
    optim_manager.zero_grad()
""",
        ),
    ),
)
