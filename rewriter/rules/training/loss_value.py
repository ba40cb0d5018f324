"""A loss that is shown or collected is the mean over the ranks.

What: ``loss.item()`` becomes ``bmt.sum_loss(loss).item()``, ``float(loss)`` becomes ``float(bmt.sum_loss(loss))``, and
``print(loss)``, ``f"{loss:.3f}"`` and ``"%.3f" % loss`` show ``bmt.sum_loss(loss)``, whatever views stand between
(``loss.detach().cpu().numpy()``, ``loss.data``); so do rows, lists of detached losses, loggers that are handed one, and
objects of the project that add up what they are given (``averager.add(loss)``). A loss may also be what a function of
the file returns after it has called backward on it.
Why: a rank's loss is that of its share of the batch; sum_loss gives the mean over all ranks, which is the loss of the
whole batch. It is a collective, so every rank makes the call.
Refuses when: the value does not come out of a model or a loss function; only one rank reaches the call.
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for loss in facts.scripts.collectives.readings(file).values():
        if not facts.scripts.in_kept_guard(file, loss) and file.source.is_exact(loss):
            change = wrap(loss, "{bmt}.sum_loss({it})")
            yield Conversion(RULE.code, loss.lineno, "the loss is averaged over the ranks", (change,))


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
