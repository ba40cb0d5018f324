"""One rank draws the progress bar.

What: ``tqdm(...)`` and ``trange(...)`` get ``disable=bmt.rank() != 0``, and so do the bars of rich and alive_progress.
Why: bars of several ranks overwrite each other.
Refuses when: the bar already has ``disable``, or only one rank reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import Arguments, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding

_BARS = {"tqdm", "trange"}
_OTHERS = {"rich.progress.track", "rich.progress.Progress", "alive_progress.alive_bar", "alive_progress.alive_it"}
_HINTS = (b"tqdm", b"trange", b"rich", b"alive_")


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or not any(hint in file.source.data for hint in _HINTS):
        return
    for node in file.calls:
        name = facts.project.external(file, node.func)
        if name not in _OTHERS and (not name.startswith("tqdm") or name.split(".")[-1] not in _BARS):
            continue
        if any(keyword.arg in {"disable", None} for keyword in node.keywords):
            continue
        if facts.scripts.in_kept_guard(file, node):
            continue
        change = Arguments(node, added=(template("disable={bmt}.rank() != 0"),))
        yield Conversion(RULE.code, node.lineno, "one rank draws the progress bar", (change,))


RULE = Rule(
    code="BMT028",
    title="one rank draws the progress bar",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nimport bmtrain as bmt\nfrom tqdm import tqdm\n\n"
            "bmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "for x in tqdm(batches):\n    optim_manager.backward(model(x).mean())\n",
            "import torch\nimport bmtrain as bmt\nfrom tqdm import tqdm\n\n"
            "bmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "for x in tqdm(batches, disable=bmt.rank() != 0):\n    optim_manager.backward(model(x).mean())\n",
        ),
    ),
)
