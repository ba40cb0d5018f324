"""A loss that is a sum over the batch is made the whole batch's.

What: ``loss.backward()`` of a loss that is a sum over the batch (``reduction="sum"``, ``torch.sum(...)``, also in a
function of the project, in all its terms) is ``(loss * bmt.world_size()).backward()``, in a loop over training data.
Why: the gradient of all ranks is the mean of theirs, and each has a share of the sum.
Refuses when: the loss has other terms beside, or it is not seen what the loop goes through: then BMT091 reports it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import loss_of
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    scripts = facts.scripts
    if file not in scripts.training or scripts.started or scripts.was_parallel(file):
        return
    for call in file.calls:
        loss = loss_of(call)
        if loss is None or call.args or call.keywords:
            continue
        if isinstance(loss, ast.Call) and isinstance(loss.func, ast.Attribute) and loss.func.attr == "scale":
            loss = loss.args[0] if len(loss.args) == 1 else loss
        if scripts.over_shares(file, call) and scripts.sums(file).is_sum(loss) and file.source.is_exact(loss):
            change = wrap(loss, "{it} * {bmt}.world_size()")
            message = "the loss is a sum over the batch, of which a rank has a share"
            yield Conversion(RULE.code, call.lineno, message, (change,))


RULE = Rule(
    code="BMT043",
    title="a loss that is a sum over the batch is the whole batch's",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(8, 8)
loader = DataLoader(data, batch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x in loader:
    loss = torch.nn.functional.mse_loss(model(x), x, reduction="sum")
    loss.backward()
    optimizer.step()
    total += loss.item()
""",
            """import torch
from torch.utils.data import DataLoader
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 8))
loader = bmt.shard_loader(DataLoader(data, batch_size=8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
for x in loader:
    loss = torch.nn.functional.mse_loss(model(x), x, reduction="sum")
    optim_manager.backward(loss * bmt.world_size())
    optim_manager.step()
    total += bmt.total(loss.item())
""",
        ),
    ),
)
