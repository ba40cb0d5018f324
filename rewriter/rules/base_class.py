"""Classes inherit bmt.DistributedModule.

What: a direct base ``nn.Module`` becomes ``bmt.DistributedModule``.
Why: a DistributedModule shards its parameters over the ranks when its outermost constructor ends.
Refuses when: ``nn.Module`` stands anywhere else than among the bases (annotations, isinstance), or the class is a
protocol of another package. Subclasses of torch layers and of project classes stay; their parameters are sharded by
the module that holds them. A project that is written for bmtrain already keeps the plain modules it has; a library of
layers without a model (no module holds another, no list of blocks, no training script) is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.project import External, File
from rewriter.types import Edit, Example, Finding, Rule, Safety


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if facts.left_as_it_is:
        return
    alias = ""
    for info in facts.classes.all(file):
        if facts.classes.kind(info) == "external" and file.convert:
            message = f"class {info.name} is based on another package's; give the model to bmt.BMTrainModelWrapper"
            yield Finding(RULE.code, info.node.lineno, message, safety=Safety.REPORT)
            continue
        for base, found in facts.classes.bases(info):
            if isinstance(found, External) and found.name == "torch.nn.Module":
                alias = alias or facts.alias(file)
                edit = Edit(file.source.span(base), (f"{alias}.DistributedModule",))
                yield Finding(
                    RULE.code,
                    base.lineno,
                    f"class {info.name} inherits {alias}.DistributedModule",
                    (edit,),
                    key="import",
                )


RULE = Rule(
    code="BMT001",
    title="classes inherit bmt.DistributedModule",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "from torch import nn\n\n\nclass MLP(nn.Module):\n    pass\n",
            "from torch import nn\nimport bmtrain as bmt\n\n\nclass MLP(bmt.DistributedModule):\n    pass\n",
        ),
        Example("from mine import nn\n\n\nclass MLP(nn.Module):\n    pass\n"),
        Example("from torch import nn\n\n\ndef freeze(module: nn.Module):\n    assert isinstance(module, nn.Module)\n"),
    ),
)
