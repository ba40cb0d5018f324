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
from rewriter.analyze.read.file import File
from rewriter.analyze.training.managers import Manager, Managers
from rewriter.changes import Change, anchor
from rewriter.rules.manager_calls import CODE, changed_calls
from rewriter.rules.manager_creation import creation, owner_place, scaler_is_made_here
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    managers = facts.managers(file)
    for manager in managers.all:
        reason = _reason_against(managers, manager)
        if reason:
            yield Refusal(RULE.code, _first_use(file, managers, manager), reason)
    made = [change for manager in managers.all if not manager.existing for change in creation(file, managers, manager)]
    calls: list[Change] = []
    for item in changed_calls(file, facts, managers):
        if isinstance(item, (Remark, Refusal)):
            yield item
        else:
            calls.append(item)
    if made or calls:
        line = file.names.statement_of(_anchor(made[0])).lineno if made else min(_anchor(c).lineno for c in calls)
        message = "an OptimManager runs backward and steps"
        yield Conversion(RULE.code, line, message, (*made, *calls), key="manager")


def _anchor(change: Change) -> ast.stmt | ast.expr:
    node = anchor(change)
    assert node is not None
    return node


def _reason_against(managers: Managers, manager: Manager) -> str:
    """Why a manager's optimizer or scaler is not understood well enough to convert the file."""
    if manager.existing:
        return ""
    for variable in (*manager.optimizers, *([manager.scaler] if manager.scaler else [])):
        path = variable[1]
        if "." in path and path.split(".")[0] not in {"self", "cls"}:
            root = variable[0], path.split(".")[0]
            made = owner_place(managers.file, managers, variable) is not None or managers.is_argument(root)
            if manager.scaler is None and made:
                continue
            return f"{path} belongs to another object, so where its manager would be made is not known"
        if not managers.is_argument(variable) and not any(v == variable for v, *_ in managers.roles.assignments):
            return f"{path} is not made in this file, so where its manager would be made is not known"
    if (
        manager.scaler is not None
        and not scaler_is_made_here(managers, manager)
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


RULE = Rule(
    code=CODE,
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
