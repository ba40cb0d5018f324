"""A loss that is shown or collected is the mean over the ranks.

What: ``loss.item()`` becomes ``bmt.sum_loss(loss).item()``, ``float(loss)`` becomes ``float(bmt.sum_loss(loss))``.
Why: a rank's loss is that of its share of the batch; sum_loss gives the mean over all ranks, which is the loss of the
whole batch. It is a collective, so every rank makes the call.
Refuses when: the value does not come out of a model or a loss function; only one rank reaches the call.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.project import File
from rewriter.types import Edit, Example, Finding, Rule, Span

_VALUES = {"item", "tolist"}
_VIEWS = {"detach", "cpu", "float", "double", "mean", "clone"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for node in file.nodes:
        if isinstance(node, ast.Call):
            span = _loss_span(file, facts, node)
            if span is not None and not facts.scripts.in_kept_guard(file, node) and _faithful(file, span):
                edit = Edit(span, (f"{facts.alias(file)}.sum_loss(", span, ")"), 4)
                yield Finding(RULE.code, node.lineno, "the loss is averaged over the ranks", (edit,))


def _loss_span(file: File, facts: Facts, call: ast.Call) -> Span | None:
    """Where the loss tensor of ``loss.item()`` or ``float(loss)`` stands."""
    losses = facts.scripts.roles[file].losses
    value: ast.expr | None = None
    if isinstance(call.func, ast.Attribute) and call.func.attr in _VALUES and not call.args:
        value = call.func.value
        while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _VIEWS:
            value = value.func.value
        if isinstance(value, ast.Attribute) and value.attr == "data":
            value = value.value
    elif isinstance(call.func, ast.Name) and call.func.id == "float" and len(call.args) == 1:
        value = call.args[0]
    if value is None or facts.scripts.roles[file].var(value) not in losses:
        return None
    return file.source.span(value)


def _faithful(file: File, span: Span) -> bool:
    """Whether positions can be trusted: inside f-strings old Pythons report wrong ones."""
    return file.source.slice(span).replace("_", "a").replace(".", "a").isalnum()


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
