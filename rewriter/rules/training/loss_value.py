"""A loss that is shown or collected is the mean over the ranks.

What: ``loss.item()`` becomes ``bmt.sum_loss(loss).item()``, ``float(loss)`` becomes ``float(bmt.sum_loss(loss))``, and
``print(loss)``, ``f"{loss:.3f}"`` and ``"%.3f" % loss`` show ``bmt.sum_loss(loss)``.
Why: a rank's loss is that of its share of the batch; sum_loss gives the mean over all ranks, which is the loss of the
whole batch. It is a collective, so every rank makes the call.
Refuses when: the value does not come out of a model or a loss function; only one rank reaches the call.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding

_VALUES = {"item", "tolist"}
_VIEWS = {"detach", "cpu", "float", "double", "mean", "clone", "to"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for node in file.nodes:
        for value in (*_read(file, facts, node), *_shown(file, facts, node)):
            if not facts.scripts.in_kept_guard(file, node) and file.source.is_exact(value):
                change = wrap(value, "{bmt}.sum_loss({it})")
                yield Conversion(RULE.code, value.lineno, "the loss is averaged over the ranks", (change,))


def _read(file: File, facts: Facts, call: ast.AST) -> Iterator[ast.expr]:
    """The loss tensor of ``loss.item()`` or ``float(loss)``."""
    value: ast.expr | None = None
    match call:
        case ast.Call(func=ast.Attribute(value=value, attr=attr), args=[]) if attr in _VALUES:
            while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _VIEWS:
                value = value.func.value
            if isinstance(value, ast.Attribute) and value.attr == "data":
                value = value.value
        case ast.Call(func=ast.Name(id="float"), args=[value]):
            pass
        case _:
            return
    roles = facts.scripts.roles[file]
    if value is not None and (roles.var(value) in roles.losses or ast.dump(value) in roles.loss_parts):
        yield value


def _shown(file: File, facts: Facts, node: ast.AST) -> Iterator[ast.expr]:
    """Loss tensors that are printed or formatted as they are."""
    values: list[ast.expr] = []
    match node:
        case ast.FormattedValue(value=value):
            values = [value]
        case ast.Call(func=ast.Name(id="print"), args=values):
            pass
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str()), attr="format"), args=values):
            pass
        case ast.BinOp(left=ast.Constant(value=str()), op=ast.Mod(), right=right):
            values = right.elts if isinstance(right, ast.Tuple) else [right]
    roles = facts.scripts.roles[file]
    for value in values:
        if isinstance(value, ast.Name) and roles.var(value) in roles.losses:
            made = [made for variable, made, _, _ in roles.assignments if variable == roles.var(value)]
            if not any(_is_number(item) for item in made):
                yield value


def _is_number(node: ast.expr) -> bool:
    """Whether a value is a number, or may be: then it has been averaged, or is no rank's own."""
    if isinstance(node, ast.Constant):
        return True
    names = {item.attr if isinstance(item, ast.Attribute) else getattr(item, "id", "") for item in ast.walk(node)}
    return bool(names & {"item", "tolist", "float"})


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
