"""A loss that is shown or collected is the mean over the ranks.

What: ``loss.item()`` becomes ``bmt.sum_loss(loss).item()``, ``float(loss)`` becomes ``float(bmt.sum_loss(loss))``, and
``print(loss)``, ``f"{loss:.3f}"`` and ``"%.3f" % loss`` show ``bmt.sum_loss(loss)``, whatever views stand between
(``loss.detach().cpu().numpy()``, ``loss.data``); so do rows, lists of detached losses, loggers that are handed one, and
objects of the project that add up what they are given (``averager.add(loss)``), functions that only show what they are
given (``report(step, loss)``), checkpoints (``torch.save({"loss": loss}, path)``), schedules that are told one, and
what a function that trains has added up and returns (``return total / count``), and what is kept of losses by
comparing or mixing them (``best = min(best, loss)``, ``if loss < best: best = loss``, ``torch.lerp(mean, loss, 0.1)``).
A loss may also be what a function of the project returns after it has called backward on it.
Why: a rank's loss is that of its share of the batch; sum_loss gives the mean over all ranks, which is the loss of the
whole batch. It is a collective, so every rank makes the call.
So is a loss, or a dict of losses, that a method is handed which only shows it: ``self.log(bmt.sum_loss(losses))``.
Refuses when: the value does not come out of a model or a loss function; only one rank reaches the call. Other methods
that a loop hands its loss to, or a dict of losses, and that show them, are reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.training.readings import candidates, viewed
from rewriter.analyze.training.roles import gone_through
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for loss in dict.fromkeys(facts.scripts.collectives.readings(file).values()):
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
                if given in names and told.isdisjoint((node, loss)):
                    if _gets_loss(facts, method.name, names.index(given), given, as_dict=bool(held)):
                        told |= {node, loss}
                        shown, advice = ast.unparse(loss), f"bmt.sum_loss({ast.unparse(loss)})"
                        if held:
                            advice = f"give it {{k: bmt.sum_loss(v) for k, v in {held}.items()}}"
                        message = f"{shown} in {cls.name}.{method.name} is of this rank's share of the batch: {advice}"
                        yield Remark(RULE.code, node.lineno, message, differs=True)


def _entries(method: ast.FunctionDef) -> dict[str, str]:
    """Names of what loops take out of dicts, and of the dicts: ``for k, v in losses.items()``."""
    loops = (node for node in ast.walk(method) if isinstance(node, (ast.For, ast.comprehension)))
    return {
        name.id: held.id
        for loop in loops
        if isinstance(loop.iter, ast.Call) and getattr(loop.iter.func, "attr", "") in {"items", "values"}
        for name, held in gone_through(loop.target, loop.iter)
        if isinstance(held, ast.Name)
    }


def _gets_loss(facts: Facts, method: str, place: int, name: str, as_dict: bool) -> bool:
    """Whether a call of ``x.method(...)``, of whatever object, hands a loss on in this place or by this name.

    With ``as_dict``, a dict of losses.
    """
    for file in facts.scripts.training:
        for call in file.calls:
            if isinstance(call.func, ast.Attribute) and call.func.attr == method:
                given = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == name)]
                roles = facts.scripts.roles[file]
                readings = facts.scripts.collectives.readings(file)
                if as_dict and any(roles.var(item) in roles.loss_dicts and item not in readings for item in given):
                    return True
                if not as_dict and any(_is_of_share(file, facts, item) for item in given):
                    return True
    return False


def _is_of_share(file: File, facts: Facts, item: ast.expr) -> bool:
    """Whether what a call gives is a loss, or one of a dict of them, that nobody averages there."""
    roles, readings = facts.scripts.roles[file], facts.scripts.collectives.readings(file)
    loss = viewed(item)
    is_loss = isinstance(item, ast.Name) and roles.var(item) in roles.losses and not _is_averaged(file, facts, item)
    is_entry = isinstance(loss, ast.Subscript) and roles.var(loss.value) in roles.loss_dicts
    return (is_loss or is_entry) and {item, loss}.isdisjoint((*readings, *readings.values()))


def _is_averaged(file: File, facts: Facts, item: ast.Name) -> bool:
    """Whether the name was last given the number of a loss, which becomes the mean: ``loss = loss.item()``."""
    roles, readings = facts.scripts.roles[file], facts.scripts.collectives.readings(file)
    statement = file.names.statement_of(item)
    around = [statement, *(parent for parent in file.names.ancestors(statement) if isinstance(parent, ast.stmt))]
    before = [
        (made.lineno, made, value)
        for variable, value, made, _ in roles.assignments
        if variable == roles.var(item) and made.lineno < item.lineno
    ]
    if not before:
        return False
    _, last, value = max(before, key=lambda found: found[0])
    straight = any(last in file.names.siblings(inside) for inside in around)
    return straight and value in readings and not isinstance(value, ast.Name)


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
