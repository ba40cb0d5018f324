"""Blocks that fill a cache are not recomputed, however the list of them is made."""

from __future__ import annotations

import pytest

from ...helpers import converted

LAYER = """import copy

from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, past_key_values=None):
        return self.inner(x)


def clones(layer, count):
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(count)])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        MAKE

    def forward(self, x, past_key_values=None):
        for index, layer in enumerate(self.layers):
            x = layer(x, past_key_values=past_key_values)
            print(index)
        return x
"""


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ("self.layers = nn.ModuleList([Layer() for _ in range(3)])", "CheckpointBlock(Layer(), use_checkpoint=False)"),
        ("self.layers = clones(Layer(), 3)", "TransformerBlockList(clones(Layer(), 3), use_checkpoint=False)"),
        (
            "self.layers = nn.ModuleList()\n        layer = Layer()\n        self.layers.append(layer)",
            "TransformerBlockList([], use_checkpoint=False)",
        ),
    ],
)
def test_blocks_with_a_cache(make: str, expected: str) -> None:
    text = converted(LAYER.replace("MAKE", make))
    assert expected in text
    assert "use_checkpoint" not in converted(LAYER.replace("MAKE", make).replace("past_key_values", "mask"))
