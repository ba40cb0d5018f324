"""Loops that look like one call of the list but are none: run before and after conversion, with the same results."""

from __future__ import annotations

import pytest
import torch

from ...helpers import converted
from .test_models_run import flat, run

HEAD = """import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.index = index

    def forward(self, x, scale=1.0, *, shift=0.0):
        return torch.tanh(self.linear(x)) * scale + shift + 0.1 * self.index


class Owned(Block):
    def __init__(self, index, owner):
        super().__init__(index)
        self.owner = [owner]

    def forward(self, x, scale):
        self.owner[0].rate += 1
        return super().forward(x, scale)


def twice(block, x):
    return block(x) * 2


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.settings = None
        self.count = 1.0
{build}

    @property
    def growing(self):
        self.count += 1
        return self.count

    def twice(self, block, x):
        return twice(block, x)

    def run(self, x, layers=None):
        if layers is None:
            layers = self.layers
        for layer in layers:
            x = layer(x)
        return x

    @staticmethod
    def of_another(other, x):
        for layer in other.layers:
            x = layer(x)
        return x

    def forward(self, x, y, scale, shift):
        seen = []
{loop}
        return x, seen


class Outer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.net = Net(depth)
{change}

    def forward(self, x, y, scale, shift):
        return self.net(x * self.gain, y, scale, shift)
"""
MAKE = "self.layers = nn.ModuleList([Block(i) for i in range(depth)])"
NONE = "self.layers = nn.ModuleList([Block(i) for i in range(depth - 2)])"
LOOP = "for layer in self.layers:\n    x = layer(x)"
OTHER = "class M:\n    layers = [torch.sin]\n"
SAVED = "for layer in self.layers:\n    if self.training:\n        x = {}(layer, x)\n    else:\n        x = layer(x)"
FIRST = "nn.ModuleList(list(self.net.layers)[:1])"

KEPT = {
    "an argument of the name": ("x = self.run(x, [torch.sin])\n" + LOOP, MAKE, ""),
    "a list of another object": (OTHER + "x = self.of_another(M, x)\n" + LOOP, MAKE, ""),
    "a function with a self": (
        OTHER
        + "def inner(self, x):\n    for layer in self.layers:\n        x = layer(x)\n    return x\nx = inner(M, x)\n"
        + LOOP,
        MAKE,
        "",
    ),
    "the variable, in what a later loop runs over": (
        LOOP + "\nfor layer in [layer.index]:\n    seen += [layer]",
        MAKE,
        "",
    ),
    "the variable, after a later loop": (
        LOOP + "\nfor layer in []:\n    pass\nelse:\n    seen += [layer.index]",
        MAKE,
        "",
    ),
    "the index, in a later comprehension": (
        "for i, layer in enumerate(self.layers):\n    x = layer(x)\nseen += [i for i in [i]]",
        MAKE,
        "",
    ),
    "variables by name": (LOOP + "\nseen.append('layer' in locals())", MAKE, ""),
    "what one pass uses up": ("g = (v for v in [0.5])\nfor layer in self.layers:\n    x = layer(x, *g)", MAKE, ""),
    "a property": ("for layer in self.layers:\n    x = layer(x, self.growing)", MAKE, ""),
    "an attribute that a block sets": (
        "for layer in self.layers:\n    x = layer(x, self.rate)",
        "self.rate = 1.0\n" + MAKE.replace("Block(i)", "Owned(i, self)"),
        "",
    ),
    "a list replaced by a loop": (LOOP, MAKE + "\nfor self.layers in [nn.ModuleList([Block(1)])]:\n    pass", ""),
    "an attribute of nothing": ("for layer in self.layers:\n    x = layer(x, self.settings.scale)", NONE, ""),
    "an argument that is not there": (
        "if len(self.layers):\n    s = 2.0\nfor layer in self.layers:\n    x = layer(x, s)",
        NONE,
        "",
    ),
    "a function that does more": (SAVED.format("twice"), MAKE, ""),
    "a method that does more": (SAVED.format("self.twice"), MAKE, ""),
    "a list replaced from outside": (LOOP, MAKE, f"self.net.layers = {FIRST}"),
    "a list replaced by name": (LOOP, MAKE, f"setattr(self.net, 'layers', {FIRST})"),
    "a list replaced with another": (
        LOOP,
        MAKE + "\nself.layers, self.n = nn.ModuleList(list(self.layers)[:1]), 2",
        "",
    ),
    "a list replaced in the dict": (LOOP, MAKE + "\nself._modules['layers'] = nn.ModuleList([Block(1)])", ""),
    "a plain list in one case": (LOOP, MAKE + " if depth > 5 else [torch.sin]", ""),
}


@pytest.mark.parametrize(("loop", "build", "change"), KEPT.values(), ids=KEPT.keys())
def test_kept(loop: str, build: str, change: str) -> None:
    loop, build, change = (text.replace("\n", "\n        ") for text in (loop, build, change))
    text = HEAD.format(loop=f"        {loop}", build=f"        {build}", change=f"        {change}")
    for name in ("twice", "checkpoint", "_gradient_checkpointing_func"):
        named = text.replace("twice", name).replace("from torch.utils.checkpoint import checkpoint\n", "")
        after = converted(named)
        assert "TransformerBlockList" in after
        assert " layers(" not in after and "other.layers(" not in after
        before, now = run(named), run(after)
        assert before[0] == now[0]
        assert not isinstance(before[1], type)
        for one, other in zip(flat(before[1]), flat(now[1]), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


CALLED = {
    "another variable's name later": LOOP + "\nfor layer in [1]:\n    seen.append(layer)",
    "one of two names later": "for i, layer in enumerate(self.layers):\n    x = layer(x)\nseen += [i for i in (1, 2)]",
    "an argument on both sides": "if y is None:\n    s = 1.0\nelse:\n    s = 2.0\n" + LOOP.replace("(x)", "(x, s)"),
    "the module's own attribute": "for layer in self.layers:\n    x = layer(x, self.count)",
    "torch's checkpoint": SAVED.format("checkpoint").replace("x)\n    e", "x, use_reentrant=False)\n    e"),
}


@pytest.mark.parametrize("loop", CALLED.values(), ids=CALLED.keys())
def test_called(loop: str) -> None:
    indented = "        " + loop.replace("\n", "\n        ")
    after = converted(HEAD.format(loop=indented, build=f"        {MAKE}", change=""))
    assert "x = self.layers(x" in after


def test_a_list_that_is_a_sequential_in_one_case() -> None:
    build = f"if depth > 5:\n    {MAKE}\nelse:\n    self.layers = nn.Sequential(*[Block(i) for i in range(depth)])"
    loop, build = (text.replace("\n", "\n        ") for text in (LOOP, build))
    text = HEAD.format(loop=f"        {loop}", build=f"        {build}", change="")
    after = converted(text)
    assert "x = self.layers(x)" in after
    assert torch.equal(next(flat(run(text)[1])), next(flat(run(after)[1])))  # type: ignore[arg-type]
