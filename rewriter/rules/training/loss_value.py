"""A loss that is shown or collected is the mean over the ranks.

What: ``loss.item()`` becomes ``bmt.sum_loss(loss).item()``, ``float(loss)`` becomes ``float(bmt.sum_loss(loss))``, and
``print(loss)``, ``f"{loss:.3f}"`` and ``"%.3f" % loss`` show ``bmt.sum_loss(loss)``, whatever views stand between
(``loss.detach().cpu().numpy()``, ``loss.data``); so do rows, lists of detached losses, loggers that are handed one, and
objects of the project that add up what they are given (``averager.add(loss)``), schedules that are told one, and what a
function that trains has added up and returns (``return total / count``). A loss may also be what a function of the
project returns after it has called backward on it.
Why: a rank's loss is that of its share of the batch; sum_loss gives the mean over all ranks, which is the loss of the
whole batch. It is a collective, so every rank makes the call.
Refuses when: the value does not come out of a model or a loss function; only one rank reaches the call. A method that
a loop hands its loss to, or a dict of losses, and that shows them, is reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import loss_of
from rewriter.analyze.training.readings import candidates, viewed
from rewriter.analyze.training.roles import Roles, Var
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for loss in facts.scripts.collectives.readings(file).values():
        if not facts.scripts.in_kept_guard(file, loss) and file.source.is_exact(loss):
            change = wrap(loss, "{bmt}.sum_loss({it})")
            yield Conversion(RULE.code, loss.lineno, "the loss is averaged over the ranks", (change,))
    yield from _in_callbacks(file, facts)


def _in_callbacks(file: File, facts: Facts) -> Iterator[Finding]:
    """``loss.item()`` in a method that a loop hands its loss to, by the method's name: it is not seen whose it is."""
    told = set(facts.scripts.collectives.readings(file))
    roles = facts.scripts.roles[file]
    for cls in (node for node in file.nodes if isinstance(node, ast.ClassDef)):
        for method in (item for item in cls.body if isinstance(item, ast.FunctionDef)):
            names = [argument.arg for argument in method.args.args[1:]]
            entries = _entries(method)
            for node, loss in ((node, viewed(node)) for item in ast.walk(method) for node in candidates(roles, item)):
                name = loss.id if isinstance(loss, ast.Name) else ""
                held = entries.get(name, "")
                if isinstance(loss, ast.Subscript) and isinstance(loss.value, ast.Name):
                    held = loss.value.id
                given = held or name
                if given in names and node not in told:
                    if _gets_loss(facts, method.name, names.index(given), given, as_dict=bool(held)):
                        told.add(node)
                        shown, advice = ast.unparse(loss), f"bmt.sum_loss({ast.unparse(loss)})"
                        if held:
                            advice = f"give it {{k: bmt.sum_loss(v) for k, v in {held}.items()}}"
                        message = f"{shown} in {cls.name}.{method.name} is of this rank's share of the batch: {advice}"
                        yield Remark(RULE.code, node.lineno, message, differs=True)


def _entries(method: ast.FunctionDef) -> dict[str, str]:
    """Names of what loops take out of dicts, and of the dicts: ``for k, v in losses.items()``."""
    found = {}
    for loop in ast.walk(method):
        if isinstance(loop, (ast.For, ast.comprehension)):
            match loop.target, loop.iter:
                case (
                    ast.Tuple(elts=[_, ast.Name(id=entry)]),
                    ast.Call(func=ast.Attribute(value=ast.Name(id=held), attr="items")),
                ) | (
                    ast.Name(id=entry),
                    ast.Call(func=ast.Attribute(value=ast.Name(id=held), attr="values")),
                ):
                    found[entry] = held
    return found


def _gets_loss(facts: Facts, method: str, place: int, name: str, as_dict: bool) -> bool:
    """Whether a call of ``x.method(...)``, of whatever object, hands a loss on in this place or by this name.

    With ``as_dict``, a dict of losses.
    """
    for file in facts.scripts.training:
        for call in file.calls:
            if isinstance(call.func, ast.Attribute) and call.func.attr == method:
                roles = facts.scripts.roles[file]
                dicts = _dicts_of_losses(roles)
                given = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == name)]
                readings = facts.scripts.collectives.readings(file)
                averaged = {*readings, *readings.values()}
                for item in given if as_dict else ():
                    if roles.var(item) in dicts:
                        return True
                for item in () if as_dict else given:
                    loss = viewed(item)
                    is_loss = isinstance(item, ast.Name) and roles.var(item) in roles.losses
                    is_entry = isinstance(loss, ast.Subscript) and roles.var(loss.value) in dicts
                    if (is_loss or is_entry) and not averaged & {item, loss}:
                        return True
    return False


def _dicts_of_losses(roles: Roles) -> set[Var]:
    """Those of which backward is called on an entry, or on what the entries add up to."""
    found: set[Var | None] = set()
    for call in roles.file.calls:
        match loss_of(call):
            case ast.Subscript(value=held, slice=ast.Constant(value=str())):
                found.add(roles.var(held))
    for value in (value for variable, value, _, _ in roles.assignments if variable in roles.trained):
        for item in ast.walk(value):
            match item:
                case ast.Call(func=ast.Name(id="sum"), args=[ast.Call(func=ast.Attribute(value=held, attr="values"))]):
                    found.add(roles.var(held))
                case ast.Subscript(value=held, slice=ast.Constant(value=str())) if "loss" in ast.unparse(held).lower():
                    found.add(roles.var(held))
    return {variable for variable in found if variable is not None}


RULE = Rule(
    code="BMT025",
    title="a loss that is shown is the mean over the ranks",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
total = 0.0
for x in batches:
    loss = model(x).mean()
    optim_manager.backward(loss)
    optim_manager.step()
    total += loss.item()
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
total = 0.0
for x in batches:
    loss = model(x).mean()
    optim_manager.backward(loss)
    optim_manager.step()
    total += bmt.sum_loss(loss).item()
""",
        ),
    ),
)
