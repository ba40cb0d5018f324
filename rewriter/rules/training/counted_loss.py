"""A loss that leaves targets out is the mean over what counts on all ranks.

What: ``nn.CrossEntropyLoss(ignore_index=pad)`` and ``nn.NLLLoss(ignore_index=pad)`` in a training script become
``bmt.loss.mean_over_ranks(...)``, and so do ``F.cross_entropy`` and ``F.nll_loss`` where they are called with
``ignore_index``.
Why: ranks hold different numbers of targets that count, so the mean of their means is not the mean of the batch.
Refuses when: the loss is no mean; the script was data parallel before.
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.training.batches import shares_data
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding

_FUNCTIONS = {"torch.nn.functional.cross_entropy", "torch.nn.functional.nll_loss"}
_MODULES = {"torch.nn.CrossEntropyLoss", "torch.nn.NLLLoss"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or b"ignore_index" not in file.source.data or facts.scripts.started:
        return
    if facts.scripts.was_parallel(file) or not shares_data(file, facts.scripts):
        return
    for call in file.calls:
        name = facts.project.external(file, call.func)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        reduced = given.get("reduction")
        if "ignore_index" not in given or not (reduced is None or getattr(reduced, "value", None) == "mean"):
            continue
        if name in _FUNCTIONS | _MODULES:
            change = wrap(call if name in _MODULES else call.func, "{bmt}.loss.mean_over_ranks({it})")
            yield Conversion(RULE.code, call.lineno, "the loss is the mean over what counts on all ranks", (change,))


RULE = Rule(
    code="BMT044",
    title="a loss that leaves targets out is the mean over all ranks' targets",
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
