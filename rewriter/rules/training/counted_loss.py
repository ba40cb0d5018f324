"""A loss that leaves targets out, or weighs them, is the mean over what counts on all ranks.

What: ``nn.CrossEntropyLoss(ignore_index=pad)`` and ``nn.NLLLoss(ignore_index=pad)`` in a training script become
``bmt.loss.mean_over_ranks(...)``, and so do ``F.cross_entropy`` and ``F.nll_loss`` where they are called with
``ignore_index``; likewise with weights of classes, with what a mask selects, and in files that pack sequences.
Why: ranks hold different numbers of targets that count, so the mean of their means is not the mean of the batch.
Refuses when: the loss is no mean; the script was data parallel before.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding

_FUNCTIONS = {"torch.nn.functional.cross_entropy", "torch.nn.functional.nll_loss"}
_MODULES = {"torch.nn.CrossEntropyLoss", "torch.nn.NLLLoss"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or facts.scripts.started:
        return
    if facts.scripts.was_parallel(file) or not facts.scripts.shares_data(file):
        return
    packs = b"pack_padded_sequence" in file.source.data or b"pack_sequence" in file.source.data
    for call in file.calls:
        name = facts.project.external(file, call.func)
        if name not in _FUNCTIONS | _MODULES or _is_counted(file, facts, call):
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        reduced = given.get("reduction")
        if {"size_average", "reduce"} & given.keys() and reduced is None:
            continue  # of old scripts: no mean, or not seen to be one
        if not (reduced is None or getattr(reduced, "value", None) == "mean"):
            continue
        of_values = 0 if name in _MODULES else 2  # how many arguments come before the weights of classes
        weight = call.args[of_values] if len(call.args) > of_values else given.get("weight")
        weighs = weight is not None and not (isinstance(weight, ast.Constant) and weight.value is None)
        if packs or weighs or "ignore_index" in given or any(map(_is_selected, call.args[:of_values])):
            change = wrap(call if name in _MODULES else call.func, "{bmt}.loss.mean_over_ranks({it})")
            yield Conversion(RULE.code, call.lineno, "the loss is the mean over what counts on all ranks", (change,))


def _is_counted(file: File, facts: Facts, call: ast.Call) -> bool:
    parent = file.names.parents[call]
    named = facts.project.external(file, parent.func) if isinstance(parent, ast.Call) else ""
    return named.endswith(".mean_over_ranks")


def _is_selected(value: ast.expr) -> bool:
    """Whether this is what a mask leaves of a batch: ``x[y > 0]``, ``x[mask]``."""
    if not isinstance(value, ast.Subscript):
        return False
    index = value.slice
    name = index.id if isinstance(index, ast.Name) else index.attr if isinstance(index, ast.Attribute) else ""
    return isinstance(index, ast.Compare) or "mask" in name


RULE = Rule(
    code="BMT044",
    title="a loss that leaves targets out, or weighs them, is the mean over all ranks' targets",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(8, 4)
loader = DataLoader(data, batch_size=8)
criterion = torch.nn.CrossEntropyLoss(ignore_index=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in loader:
    criterion(model(x), y).backward()
    optimizer.step()
""",
            """import torch
from torch.utils.data import DataLoader
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 4))
loader = bmt.shard_loader(DataLoader(data, batch_size=8))
criterion = bmt.loss.mean_over_ranks(torch.nn.CrossEntropyLoss(ignore_index=0))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
for x, y in loader:
    optim_manager.backward(criterion(model(x), y))
    optim_manager.step()
""",
        ),
    ),
)
