# ruff: noqa: E501 - tables of code are easier to read on one line
"""Every rule's own examples, executed; and texts that no rule may change."""

from __future__ import annotations

import ast

import pytest

from rewriter.rules import RULES
from rewriter.rules.rule import Example, Rule

from .helpers import converted

CASES = [
    pytest.param(rule, example, id=f"{rule.code}-{number}")
    for rule in RULES
    for number, example in enumerate(rule.examples)
]


@pytest.mark.parametrize(("rule", "example"), CASES)
def test_example(rule: Rule, example: Example) -> None:
    after = converted(example.before, unsafe=example.unsafe, tensor_parallel=example.tensor_parallel)
    assert after == (example.after or example.before)
    ast.parse(after)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_rule_explains_itself(rule: Rule) -> None:
    for word in ("What:", "Why:", "Refuses when:"):
        assert word in rule.explanation
    assert rule.examples


NOOP = {
    "local class called Module": "class Module: pass\n\n\nclass A(Module):\n    pass\n",
    "shadowed nn": "from torch import nn\nnn = object()\n\n\nclass A(nn.Module):\n    pass\n",
    "another nn": "from flax import linen as nn\n\n\nclass A(nn.Module):\n    pass\n",
    "parameter called nn": "def make(nn):\n    class A(nn.Module):\n        pass\n    return A\n",
    "annotation": "import torch.nn as nn\n\n\ndef f(m: nn.Module) -> nn.Module:\n    return m\n",
    "isinstance": "import torch\n\nprint(isinstance(1, torch.nn.Module))\n",
    "text": "SOURCE = 'class A(torch.nn.Module): pass'\n",
    "torch leaf": "import torch\n\n\nclass Norm(torch.nn.LayerNorm):\n    pass\n",
    "empty": "",
    "comment only": "# nothing\n",
    "skip": "import torch\n\n\nclass A(torch.nn.Module):  # bmt: skip\n    pass\n",
    "skip one": "import torch\n\n\nclass A(torch.nn.Module):  # bmt: skip[BMT001]\n    pass\n",
    "skip file": "# bmt: skip-file\nimport torch\n\n\nclass A(torch.nn.Module):\n    pass\n",
}


@pytest.mark.parametrize("text", NOOP.values(), ids=NOOP.keys())
def test_noop(text: str) -> None:
    assert converted(text) == text


SPELLINGS = {
    "torch.nn.Module": "import torch\n",
    "nn.Module": "import torch.nn as nn\n",
    "nn .Module": "from torch import nn\n",
    "Module": "from torch.nn import Module\n",
    "M": "from torch.nn import Module as M\n",
    "th.nn.Module": "import torch as th\n",
    "nn.modules.Module": "from torch import nn\n",
    "Base": "import torch\nBase = torch.nn.Module\n",
}


@pytest.mark.parametrize(("base", "imports"), SPELLINGS.items(), ids=SPELLINGS.keys())
def test_spelling(base: str, imports: str) -> None:
    before = f"{imports}\n\nclass A({base}):\n    pass\n"
    lines = imports.splitlines(keepends=True)
    expected = (
        "".join([lines[0], "import bmtrain as bmt\n", *lines[1:]]) + "\n\nclass A(bmt.DistributedModule):\n    pass\n"
    )
    assert converted(before) == expected


def test_two_kinds_of_bytes_survive() -> None:
    before = '"""Été."""\r\nimport torch\r\n\r\n\r\nclass A(torch.nn.Module):\r\n\tname = "é" ;  other = 1\r\n'
    after = '"""Été."""\r\nimport torch\r\nimport bmtrain as bmt\r\n\r\n\r\nclass A(bmt.DistributedModule):\r\n\tname = "é" ;  other = 1\r\n'
    assert converted(before) == after


def test_import_never_before_future() -> None:
    before = '"""Doc."""\nfrom __future__ import annotations\ntry:\n    import torch\nexcept ImportError:\n    torch = None\n\n\nclass A(torch.nn.Module):\n    pass\n'
    after = converted(before)
    assert after.startswith('"""Doc."""\nfrom __future__ import annotations\nimport bmtrain as bmt\ntry:\n')
