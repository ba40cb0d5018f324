"""A random batch is drawn whole by every rank, which keeps its share.

What: ``torch.randint(n, (batch_size,))`` that picks a batch becomes
``bmt.shard_batch(torch.randint(n, (batch_size,)))``, and so does ``index = torch.randint(n, (12,))`` of any size by
which a loop that trains takes its items, ``data[index]``.
Why: all ranks draw the same numbers (same seed), so together they see the batch of the unconverted script.
A script that nothing shares out data in is reported.
Refuses when: the script is already data parallel (DDP, a rank-dependent seed); the size is not a batch size by name,
nor the batch of a loop that trains taken by it; the call is in a model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.training.batches import random_batches, shares_data
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or facts.scripts.started or facts.scripts.is_parallel(file):
        return
    if b"OptimManager(" in file.source.data:  # converted already
        return
    for node in random_batches(file, facts.scripts):
        change = wrap(node, "{bmt}.shard_batch({it})")
        yield Conversion(RULE.code, node.lineno, "every rank keeps its share of the random batch", (change,))
    if facts.scripts.trains(file) and not shares_data(file, facts.scripts):
        line = next(c.lineno for c in file.calls if isinstance(c.func, ast.Attribute) and c.func.attr == "backward")
        message = "nothing here is known to give every rank its share of the data; bmt.shard_batch would"
        yield Remark(RULE.code, line, message)


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
