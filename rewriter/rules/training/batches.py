"""A batch that a script takes without a loader is taken whole by every rank, which keeps its share.

What: ``torch.randint(n, (batch_size,))`` that picks a batch becomes
``bmt.shard_batch(torch.randint(n, (batch_size,)))``, and so does ``index = torch.randint(n, (12,))`` of any size by
which a loop that trains takes its items, ``data[index]``. Positions may be drawn by torch, numpy, ``random`` or a
generator that has a seed (``np.random.choice(n, 12)``, ``random.sample(range(n), 12)``, ``torch.randperm(n)[:12]``,
``rng.integers(0, n, 12)``). Slices of an order that is drawn are shared out, too: ``order[i : i + 12]`` of
``order = np.random.permutation(n)``, of a list that ``random.shuffle`` has shuffled, or of ``x[order]``;
``for index in order.split(12)`` goes through ``map(bmt.shard_batch, order.split(12))``.
Why: all ranks draw the same numbers (same seed), so together they see the batch of the unconverted script. A batch that
cannot be shared evenly, such as the last of an order may be, raises ConfigurationError.
Refuses when: the script is already data parallel (DDP, a rank-dependent seed); the size is not a batch size by name,
nor the batch of a loop that trains taken by it; the call is in a model; the loop has a loader. What is taken under a
test, in a class or function that serves others as well, in two numbers of items, by a generator without a seed, or by
slices of data in their order (which may be pieces of a text), and a batch whose items a loss compares with each other,
is reported, with what to write, and so is a script in which nothing is known to share out the data: the last line then
names the place.
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import is_backward
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or facts.scripts.started or facts.scripts.is_parallel(file):
        return
    if b"OptimManager(" in file.source.data:  # converted already
        return
    taken = facts.scripts.batches.of(file)
    for nodes, code in ((taken.whole, "{bmt}.shard_batch({it})"), (taken.parts, "map({bmt}.shard_batch, {it})")):
        for node in nodes:
            change = wrap(node, code)
            yield Conversion(RULE.code, node.lineno, "every rank keeps its share of the batch", (change,))
    for node, reason in taken.left:
        message = f"{file.source.code(node)} is not shared out over the ranks: {reason}"
        if "write" not in reason and "seed" not in reason:
            message += "; where it is trained on, write x, y = bmt.shard_batch((x, y))"
        yield Remark(RULE.code, node.lineno, message, differs=True)
    if facts.scripts.trains(file) and not taken.left and not facts.scripts.shares_data(file):
        line = next(filter(is_backward, file.calls)).lineno
        message = (
            "all ranks train on the same batches, as nothing is known to share them out: where one is made, write "
            "batch = bmt.shard_batch(batch)"
        )
        yield Remark(RULE.code, line, message, differs=True)


RULE = Rule(
    code="BMT023",
    title="a batch that is taken without a loader is shared out over the ranks",
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
        Example(
            """import numpy as np
import torch

model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(2):
    order = np.random.permutation(64)
    for start in range(0, 64, 8):
        model(data[order[start : start + 8]]).mean().backward()
        optimizer.step()
""",
            """import numpy as np
import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
for epoch in range(2):
    order = np.random.permutation(64)
    for start in range(0, 64, 8):
        optim_manager.backward(model(data[bmt.shard_batch(order[start : start + 8])]).mean())
        optim_manager.step()
""",
        ),
    ),
)
