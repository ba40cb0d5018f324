"""Parameters are bmt.DistributedParameter.

What: ``nn.Parameter(...)`` in a method of a module becomes ``bmt.DistributedParameter(...)``.
Why: a DistributedParameter keeps only the rank's share of its values between uses, and shows its whole shape.
Refuses when: the name is not called (annotations, isinstance), the call is outside a class that becomes a
DistributedModule, or it is inside ``forward``.
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.parameters import parameter_calls
from rewriter.analyze.read.file import File
from rewriter.changes import replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if facts.left_as_it_is:
        return
    for node in parameter_calls(file, facts.classes):
        change = replace(node.func, "{bmt}.DistributedParameter")
        yield Conversion(RULE.code, node.lineno, "the parameter is distributed", (change,))


RULE = Rule(
    code="BMT002",
    title="parameters are bmt.DistributedParameter",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nfrom torch.nn import Module, Parameter as P\n\n\n"
            "class Scale(Module):\n    def __init__(self):\n"
            "        super().__init__()\n        self.g = P(torch.ones(8))  # gain\n",
            "import torch\nfrom torch.nn import Module, Parameter as P\nimport bmtrain as bmt\n\n\n"
            "class Scale(bmt.DistributedModule):\n    def __init__(self):\n"
            "        super().__init__()\n        self.g = bmt.DistributedParameter(torch.ones(8))  # gain\n",
        ),
        Example("import torch\n\n\ndef count(p: torch.nn.Parameter):\n    return isinstance(p, torch.nn.Parameter)\n"),
    ),
)
