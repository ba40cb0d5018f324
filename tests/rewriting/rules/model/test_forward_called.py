"""A loop that calls ``block.forward`` is one over blocks like any other; models below a package's are sharded whole."""

from __future__ import annotations

import pytest

from ...helpers import converted

MODEL = """from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def forward(self, x, mask):
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x, mask):
        seen = []
{loop}
        return x
"""
LOOPS = {
    "one call": ("for block in self.blocks:\n    x = block.forward(x, mask)", "        x = self.blocks(x, mask)\n"),
    "kept": (
        "for block in self.blocks:\n    x = block.forward(x, mask)\n    seen.append(x)",
        "            x = block(x, mask)\n            seen.append(x)\n",
    ),
    "saving memory": (
        "for block in self.blocks:\n    x = checkpoint(block.forward, x, mask)\n    seen.append(x)",
        "for block in self.blocks:\n",
    ),
    "numbered": (
        "for i in range(len(self.blocks)):\n    x = self.blocks[i].forward(x, mask)\n    seen.append(x)",
        "            x = self.blocks[i](x, mask)\n",
    ),
}


@pytest.mark.parametrize(("loop", "wanted"), LOOPS.values(), ids=LOOPS.keys())
def test_forward_of_a_block(loop: str, wanted: str) -> None:
    body = "".join(f"        {line}\n" for line in loop.splitlines()).rstrip("\n")
    after = converted(MODEL.replace("{loop}", body))
    assert "bmt.TransformerBlockList(" in after and wanted in after and "block.forward" not in after


HUB = """from torch import nn
from transformers import BertPreTrainedModel


class Head(nn.Module):
    pass


class Base(BertPreTrainedModel):
    pass


class Middle(Base):
    pass


class Tagger(Middle):
    def __init__(self, config):
        super().__init__(config)
        self.head = Head()


class Larger(Tagger):
    def __init__(self, config):
        super().__init__(config)
        self.more = Head()
"""


def test_a_grandchild_of_another_packages_model() -> None:
    after = converted(HUB)
    assert "class Tagger(Middle, bmt.DistributedModule):" in after and "class Larger(Tagger):" in after
    assert "class Base(BertPreTrainedModel):" in after and "class Middle(Base):" in after
