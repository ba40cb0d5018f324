# ruff: noqa: E501 - tables of code are easier to read on one line
"""Models that hold pairs of modules, converted with and without --unsafe and run against the original."""

from __future__ import annotations

import pytest
import torch

from ...helpers import converted
from .test_models_run import flat, indented, run

PAIRS = """import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
{build}

    def forward(self, x, y, scale, shift):
{loop}
        return x, y


class Outer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.net = Net(depth)

    def forward(self, x, y, scale, shift):
        return self.net(x, y, scale, shift)
"""
PAIR_BUILDS = [
    "self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(depth)])",
    "self.layers = nn.ModuleList([])\nfor _ in range(depth):\n    self.layers.append(nn.ModuleList([\n        nn.Linear(4, 4),\n        nn.Linear(4, 4),\n    ]))",
]
PAIR_LOOPS = [
    "x = one(x) + x\nx = two(x) * scale + x",
    "x = one(x) + y  # comment\n\n# more\nx = two(x)",
    "x, y = one(x), two(y)",
    "h = one(x)\nx = two(h) + x",
    "if scale > 0:\n    h = one(x)\nelse:\n    h = x\nx = x + two(h) + shift",
    "x += one(x)\nx += two(y)",
    "x = x + torch.stack([part(x) for part in (one, two)]).sum(0)",
    "y = one(y)\nx = two(x) + y",
    "x = one(x)\nif scale > 9:\n    break\nx = two(x)",
    "self.last = one(x)\nx = two(x)",
]


@pytest.mark.parametrize("build", PAIR_BUILDS)
@pytest.mark.parametrize("body", PAIR_LOOPS)
def test_outlined_pairs_compute_the_same(build: str, body: str) -> None:
    loop = "for one, two in self.layers:\n" + indented(body, 4)
    text = PAIRS.format(build=indented(build, 8), loop=indented(loop, 8))
    outlined, kept = converted(text, unsafe=True), converted(text)
    assert ("class _NetLayer(nn.ModuleList):" in outlined) is ("break" not in body and "self." not in body)
    assert "class _NetLayer" not in kept and "TransformerBlockList" in kept
    keys, outputs = run(text)
    for after in (outlined, kept):
        converted_keys, converted_outputs = run(after)
        assert keys == converted_keys
        for one, other in zip(flat(outputs), flat(converted_outputs), strict=True):
            assert torch.equal(one, other)  # type: ignore[arg-type]


LEVELS = """self.layers = nn.ModuleList()
for index in range(depth):
    level = nn.Module()
    level.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    if index:
        level.up = Scale()
    {add}"""
LEVEL_LOOPS = [
    "for level in self.layers:\n    for part in level.parts:\n        x = part(x) + y\n    if hasattr(level, 'up'):\n        x = level.up(x)",
    "for i in range(len(self.layers)):\n    for j in range(2):\n        x = x + self.layers[i].parts[j](x)",
    "seen = [x]\nfor i in reversed(range(len(self.layers))):\n    seen.append(self.layers[i].parts[0](seen[-1]))\nx = seen.pop()",
    "for one, other in zip(self.layers, self.layers[1:]):\n    x = other.parts[0](x) + one.parts[1](y)",
]


@pytest.mark.parametrize("add", ["self.layers.append(level)", "self.layers.insert(0, level)"])
@pytest.mark.parametrize("loop", LEVEL_LOOPS)
def test_levels_compute_the_same(loop: str, add: str) -> None:
    scale = "class Scale(nn.Module):\n    def forward(self, x):\n        return x * 2\n\n\nclass Net("
    text = PAIRS.format(build=indented(LEVELS.format(add=add), 8), loop=indented(loop, 8)).replace("class Net(", scale)
    after = converted(text)
    assert "self.layers = bmt.TransformerBlockList([])" in after
    (keys, outputs), (converted_keys, converted_outputs) = run(text), run(after)
    assert keys == converted_keys and not isinstance(outputs, type)
    for one, other in zip(flat(outputs), flat(converted_outputs), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
