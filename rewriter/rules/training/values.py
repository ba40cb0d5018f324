"""Code that reads or writes parameters gets whole ones.

What: a loop over ``model.parameters()`` (``named_parameters``, ``modules``) that reads or writes values, and an
initialisation such as ``nn.init.zeros_(model.head.weight)``, are put in ``with bmt.gathered(model):``, with
``write=True`` if they write. Element-wise updates through ``p.data``, as of an averaged model, act on ``p`` itself
under ``torch.no_grad()``. ``model.head.weight.data`` and ``.detach()`` of one parameter, where they are read, are
taken of ``model.head.weight.gather()``; where a name that stands for them is written, the statements that have it are
put in ``with bmt.gathered(model.head.weight, write=True):``. ``p.grad``, where a loop over parameters reads it,
becomes ``bmt.gather_grad(p)``.
Why: outside a forward a rank holds only its share of every parameter. Element-wise updates need no more than that.
Refuses when: only one rank reaches the code; it stands in a constructor, a forward or an initialisation method, where
parameters are whole; it only looks at shapes, names or ``requires_grad``. A name for ``p.data`` that is used after a
step, too, is reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.training.values import ValueUse
from rewriter.changes import Arguments, Change, Under, replace, template, wrap
from rewriter.rules.imports import imports
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for shown in facts.values(file).shown:
        if not facts.scripts.in_kept_guard(file, shown):
            change = wrap(shown, "{it}.gather()")
            yield Conversion(RULE.code, shown.lineno, "all ranks give the values of a parameter", (change,))
    for statement in facts.values(file).unclear:
        code = file.source.code(statement.targets[0])
        message = (
            f"{code} follows the parameter, of which a rank holds its share: where parts of it are read, every rank is "
            f"to take {code}.full_tensor() before"
        )
        yield Remark(RULE.code, statement.lineno, message, differs=True)
    for grad in facts.values(file).gradients:
        if not facts.scripts.in_kept_guard(file, grad):
            change = replace(grad, "{bmt}.gather_grad({parameter})", parameter=grad.value)
            yield Conversion(RULE.code, grad.lineno, "the gradient is whole here", (change,))
    for use in facts.values(file).uses:
        if facts.scripts.in_kept_guard(file, use.node) or facts.scripts.in_opened_guard(file, use.node):
            message = "parameters are read here under a test of the rank, and a rank holds only its share of them"
            yield Remark(RULE.code, use.node.lineno, message)
            continue
        message = "every rank updates its share" if use.local else "parameters are whole here"
        yield Conversion(RULE.code, use.node.lineno, message, tuple(_changes(file, facts, use)))


def _changes(file: File, facts: Facts, use: ValueUse) -> Iterator[Change]:
    if use.local or use.states:
        yield from imports(file, "torch")
    if use.local:
        for data in use.data:
            yield replace(data, "{parameter}", parameter=data.value)
        if not _without_gradients(file, facts, use.node):
            yield Under((use.node,), template("with torch.no_grad():"))
        return
    for kept in use.kept:  # what is gathered goes when the block ends
        yield wrap(kept, "{it}.clone()")
    for call in use.states:
        yield Arguments(call, added=(template("keep_vars=True"),))
    models = {file.source.code(model): model for model in (*use.models, *use.read)}
    read = {file.source.code(model) for model in use.read}
    holes = {f"model_{number}": model for number, model in enumerate(models.values())}
    contexts = ["torch.no_grad()"] if use.states else []
    for hole, code in zip(holes, models, strict=True):
        write = ", write=True" if use.writes and code not in read else ""
        contexts.append(f"{{bmt}}.gathered({{{hole}}}{write})")
    yield Under((use.node, *use.then), template(f"with {', '.join(contexts)}:", **holes))


def _without_gradients(file: File, facts: Facts, node: ast.stmt) -> bool:
    """Whether gradients are off around a statement."""
    for parent in file.names.ancestors(node):
        calls: list[ast.expr] = []
        if isinstance(parent, ast.With):
            calls = [item.context_expr for item in parent.items]
        elif isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            calls = list(parent.decorator_list)
        for call in calls:
            name = call.func if isinstance(call, ast.Call) else call
            if facts.project.external(file, name) in {"torch.no_grad", "torch.inference_mode"}:
                return True
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return False
    return False


RULE = Rule(
    code="BMT036",
    title="code that reads or writes parameters gets whole ones",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
for p in model.parameters():
    if p.dim() > 1:
        torch.nn.init.xavier_uniform_(p)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
for average, p in zip(averages.parameters(), model.parameters()):
    average.data.mul_(0.9).add_(p.data, alpha=0.1)
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
with bmt.gathered(model, write=True):
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.xavier_uniform_(p)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
with torch.no_grad():
    for average, p in zip(averages.parameters(), model.parameters()):
        average.mul_(0.9).add_(p, alpha=0.1)
""",
        ),
    ),
)
