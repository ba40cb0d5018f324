"""Classes inherit bmt.DistributedModule.

What: a direct base ``nn.Module`` becomes ``bmt.DistributedModule``. A model of the project's modules that derives
from a base class of transformers or diffusers gets ``bmt.DistributedModule`` beside its own, so that it is sharded once
whole.
Why: a DistributedModule shards its parameters over the ranks when its outermost constructor ends.
Refuses when: ``nn.Module`` stands anywhere else than among the bases (annotations, isinstance), or the class is a
protocol of another package, or has a metaclass of its own. Subclasses of torch layers and of project classes stay;
their parameters are sharded by the module that holds them. A project that is written for bmtrain already keeps the
plain modules it has; a library of layers without a model (no module holds another, no list of blocks, no training
script) is left alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.classes import is_hub_base
from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.changes import Arguments, Change, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_BASE = "{bmt}.DistributedModule"


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if facts.left_as_it_is:
        return
    for info in facts.classes.all(file):
        external = [(base, found.name) for base, found in facts.classes.bases(info) if isinstance(found, External)]
        bases = [base for base, name in external if name == "torch.nn.Module"]
        if bases and _own_metaclass(info, facts):
            message = f"class {info.name} has a metaclass of its own; give the model to bmt.BMTrainModelWrapper"
            yield Remark(RULE.code, info.node.lineno, message)
            continue
        beside = not bases and _stands_beside(info, facts)
        if not (bases or beside) and facts.classes.kind(info) == "external" and file.convert:
            message = f"class {info.name} is based on another package's; give the model to bmt.BMTrainModelWrapper"
            yield Remark(RULE.code, info.node.lineno, message)
        for base in info.node.bases[-1:] if beside else bases:
            change: Change = replace(base, _BASE)
            if beside:
                change = Arguments(info.node, added=(template(_BASE),))
            message = f"class {info.name} inherits {facts.alias(file)}.DistributedModule"
            yield Conversion(RULE.code, base.lineno, message, (change,), key="import")


def _stands_beside(info: ClassInfo, facts: Facts) -> bool:
    """Whether a class that derives from transformers or diffusers, at any depth, is where its model is made whole."""
    if not any(map(is_hub_base, facts.classes.external_bases(info))) or not _holds_modules(info, facts):
        return False
    return not any(_stands_beside(above, facts) for above in facts.classes.ancestors(info))


def _own_metaclass(info: ClassInfo, facts: Facts) -> bool:
    """Whether Python could not make the class with ``bmt.DistributedModule``, whose metaclass derives from ABCMeta."""
    return any(
        keyword.arg == "metaclass" and facts.project.external(member.file, keyword.value) not in ("abc.ABCMeta", "type")
        for member in (info, *facts.classes.ancestors(info))
        for keyword in member.node.keywords
    )


def _holds_modules(info: ClassInfo, facts: Facts) -> bool:
    """Whether the class makes modules of the project, each of which would be sharded as soon as it is made."""
    made = (facts.project.resolve(info.file, node.func) for node in ast.walk(info.node) if isinstance(node, ast.Call))
    return any(isinstance(found, ClassInfo) and facts.classes.kind(found) == "module" for found in made)


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
        Example(
            """from torch import nn
from transformers import BertPreTrainedModel


class Head(nn.Module):
    pass


class Tagger(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.head = Head()
""",
            """from torch import nn
from transformers import BertPreTrainedModel
import bmtrain as bmt


class Head(bmt.DistributedModule):
    pass


class Tagger(BertPreTrainedModel, bmt.DistributedModule):
    def __init__(self, config):
        super().__init__(config)
        self.head = Head()
""",
        ),
        Example(
            "from torch import nn\n\n\nclass Kind(type):\n    pass\n\n\n"
            "class MLP(nn.Module, metaclass=Kind):\n    pass\n"
        ),
        Example("from mine import nn\n\n\nclass MLP(nn.Module):\n    pass\n"),
        Example("from torch import nn\n\n\ndef freeze(module: nn.Module):\n    assert isinstance(module, nn.Module)\n"),
    ),
)
