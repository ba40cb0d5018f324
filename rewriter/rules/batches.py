"""A random batch is drawn whole by every rank, which keeps its share.

What: ``torch.randint(n, (batch_size,))`` that picks a batch becomes
``bmt.shard_batch(torch.randint(n, (batch_size,)))``.
Why: all ranks draw the same numbers (same seed), so together they see the batch of the unconverted script.
A script that nothing shares out data in is reported.
Refuses when: the script is already data parallel (DDP, a rank-dependent seed); the size is not a batch size by name;
the call is in a model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.names import dotted
from rewriter.analyze.project import File
from rewriter.types import Edit, Example, Finding, Rule, Safety

_DRAWS = {"torch.randint", "torch.randn", "torch.rand"}
_BATCH = re.compile(r"^(?:\w*batch(?:_?size)?|bs|bsz|B|n_?batch)$")


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or facts.scripts.started or facts.scripts.is_parallel(file):
        return
    if b"OptimManager(" in file.source.data:  # converted already
        return
    for node in _random_batches(file, facts):
        span = file.source.span(node)
        edit = Edit(span, (f"{facts.alias(file)}.shard_batch(", span, ")"), 4)
        yield Finding(RULE.code, node.lineno, "every rank keeps its share of the random batch", (edit,))
    if facts.scripts.trains(file) and not shares_data(file, facts):
        line = next(c.lineno for c in file.calls if isinstance(c.func, ast.Attribute) and c.func.attr == "backward")
        message = "nothing here is known to give every rank its share of the data; bmt.shard_batch would"
        yield Finding(RULE.code, line, message, safety=Safety.REPORT)


def shares_data(file: File, facts: Facts) -> bool:
    """Whether ranks get other data, as far as can be seen."""
    if facts.scripts.shares_data(file):
        return True
    return any(True for other in facts.scripts.training for _ in _random_batches(other, facts))


def _random_batches(file: File, facts: Facts) -> Iterator[ast.Call]:
    for node in file.calls:
        if facts.project.external(file, node.func) not in _DRAWS:
            continue
        owner = file.names.class_of(node)
        if owner is not None and facts.classes.is_module(file.class_info(owner)):
            continue
        parent = file.names.parents[node]
        if isinstance(parent, ast.Call) and facts.project.external(file, parent.func) == "bmtrain.shard_batch":
            continue
        if _batch_sized(node) and isinstance(parent, (ast.Assign, ast.AnnAssign, ast.Call, ast.Attribute)):
            yield node


def _batch_sized(call: ast.Call) -> bool:
    """Whether the first dimension asked for is a batch size by name."""
    sizes = [keyword.value for keyword in call.keywords if keyword.arg == "size"]
    sizes += [argument for argument in call.args if isinstance(argument, (ast.Tuple, ast.List))]
    function = (dotted(call.func) or "").split(".")[-1]
    if not sizes and function != "randint" and call.args:
        sizes = [ast.Tuple(elts=list(call.args[:1]), ctx=ast.Load())]
    for size in sizes[:1]:
        if isinstance(size, (ast.Tuple, ast.List)) and size.elts:
            return bool(_BATCH.match((dotted(size.elts[0]) or "").split(".")[-1]))
    return False


RULE = Rule(
    code="BMT023",
    title="a random batch is shared out over the ranks",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch


def get_batch(data, batch_size, length):
    starts = torch.randint(len(data) - length, (batch_size,))
    return torch.stack([data[i : i + length] for i in starts])


model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(get_batch(data, 4, 8)).mean().backward()
optimizer.step()
""",
            """import torch
import bmtrain as bmt


def get_batch(data, batch_size, length):
    starts = bmt.shard_batch(torch.randint(len(data) - length, (batch_size,)))
    return torch.stack([data[i : i + length] for i in starts])


bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
optim_manager.backward(model(get_batch(data, 4, 8)).mean())
optim_manager.step()
""",
        ),
    ),
)
