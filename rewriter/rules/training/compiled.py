"""A compiled model is compiled by bmt.compile.

What: ``torch.compile(model)`` becomes ``bmt.compile(model)``.
Why: gathering and releasing parameters stay outside the compiled code, and the state-dict keys stay the model's.
Refuses when: what is compiled is not the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or b"compile" not in file.source.data:
        return
    roles = facts.scripts.roles[file]
    for node in file.calls:
        if node.args and facts.project.external(file, node.func) == "torch.compile":
            if roles.is_model(node.args[0]):
                change = replace(node.func, "{bmt}.compile")
                yield Conversion(RULE.code, node.lineno, "the blocks are compiled one by one", (change,))


RULE = Rule(
    code="BMT032",
    title="a compiled model is compiled by bmt.compile",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nimport bmtrain as bmt\n\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "model = torch.compile(model)\noptim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "optim_manager.backward(model(x).mean())\n",
            "import torch\nimport bmtrain as bmt\n\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "model = bmt.compile(model)\noptim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "optim_manager.backward(model(x).mean())\n",
        ),
    ),
)
