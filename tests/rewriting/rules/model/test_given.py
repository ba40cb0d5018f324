"""Lists that a class does not make itself: given to its constructor, returned among other things, made by torch."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch

from ... import stub
from ...helpers import converted

HEAD = """import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = nn.Linear(size, 4)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Encoder(nn.Module):
    def __init__(self, {argument}, scale=1.0):
        super().__init__()
        {store}
        self.scale = scale

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def make(depth=2):
    {caller}
"""
LIST = "layers = nn.ModuleList([Layer() for _ in range(depth)])"
CALLS = {
    "nobody makes one": "return None",
    "one of them is given something else": f"{LIST}\n    return Encoder(layers), Encoder(depth)",
    "one of them is given nothing": f"{LIST}\n    return Encoder(layers), Encoder(*depth)",
    "a Python list": "layers = [Layer() for _ in range(depth)]\n    return Encoder(layers)",
    "single torch layers": "return Encoder(nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)]))",
    "nothing at a place": "return Encoder(nn.ModuleList([Layer(), None]))",
    "it grows afterwards": f"{LIST}\n    model = Encoder(layers)\n    layers.append(Layer())\n    return model",
    "a Sequential": "return Encoder(nn.Sequential(Layer(), Layer()))",
    "one object twice": "layer = Layer()\n    return Encoder(nn.ModuleList([layer for _ in range(depth)]))",
}


def text(caller: str, argument: str = "layers", store: str = "self.layers = layers") -> str:
    return HEAD.format(caller=caller, argument=argument, store=store)


@pytest.mark.parametrize("caller", CALLS.values(), ids=CALLS.keys())
def test_stays(caller: str) -> None:
    after = converted(text(caller))
    assert "TransformerBlockList" not in after and "CheckpointBlock" not in after


@pytest.mark.parametrize("argument", ["layers=None", "layers: 'nn.ModuleList' = None", "layers: nn.ModuleList | None"])
def test_an_argument_that_may_be_none_stays(argument: str) -> None:
    assert "TransformerBlockList" not in converted(text(f"{LIST}\n    return Encoder(layers)", argument))


def test_an_argument_of_a_method_stays() -> None:
    # Only constructors are followed: a method may be called with anything, more than once.
    after = converted(
        text(f"{LIST}\n    return Encoder(layers)", "depth", "self.use(depth)")
        + "\n\nclass Late(Encoder):\n    def use(self, layers):\n        self.layers = layers\n"
    )
    assert "TransformerBlockList" not in after


BECOMES = {
    "by name": f"{LIST}\n    return Encoder(layers=layers)",
    "in place": "return Encoder(nn.ModuleList([Layer() for _ in range(depth)]))",
    "from a loop": "layers = nn.ModuleList()\n    for _ in range(depth):\n        layers.append(Layer())\n"
    "    return Encoder(layers)",
    "two who make one": f"{LIST}\n    other = nn.ModuleList(Layer() for _ in range(3))\n"
    "    return Encoder(layers) if depth else Encoder(other)",
    "by a subclass": f"""class Small(Encoder):
        def __init__(self, depth):
            {LIST}
            super().__init__(layers, scale=2.0)

    return Small(depth)""",
    "by a subclass that names its base": f"""class Small(Encoder):
        def __init__(self, depth):
            {LIST}
            Encoder.__init__(self, layers)

    return Small(depth)""",
    "through two constructors": f"""class Whole(Encoder):
        def __init__(self, layers):
            super().__init__(layers)

    {LIST}
    return Whole(layers)""",
}


def run(source: str) -> tuple[list[str], torch.Tensor]:
    space: dict[str, object] = {}
    torch.manual_seed(0)
    with mock.patch.dict(sys.modules, {"bmtrain": stub.module()}):
        exec(compile(source, "model", "exec"), space)
        model = space["make"]()  # type: ignore[operator]
    return list(model.state_dict()), model(torch.ones(2, 4))


def same(source: str) -> str:
    """The text after conversion, which makes the same model."""
    after = converted(source)
    (keys, out), (after_keys, after_out) = run(source), run(after)
    assert keys == after_keys and torch.equal(out, after_out)
    return after


@pytest.mark.parametrize("caller", BECOMES.values(), ids=BECOMES.keys())
def test_given_lists_become_lists_of_blocks(caller: str) -> None:
    after = same(text(caller, "layers: nn.ModuleList"))
    assert "        self.layers = bmt.TransformerBlockList(layers)\n" in after and "x = self.layers(x)\n" in after
    assert "CheckpointBlock" not in after


def test_given_as_one_of_several_kinds() -> None:
    store = "if isinstance(layers, list):\n            layers = nn.ModuleList(layers)\n        self.layers = layers"
    after = same(text(f"{LIST}\n    return Encoder(layers)", store=store))
    assert "layers = nn.ModuleList(layers)\n        self.layers = bmt.TransformerBlockList(layers)\n" in after
    # What is assigned in any case is the list, whatever the argument is.
    store = "layers = nn.ModuleList([Layer() for _ in range(layers)])\n        self.layers = layers"
    assert "bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for" in same(text("return Encoder(2)", store=store))


RETURNED = {
    "by a function": "self.layers, self.depth = pieces(depth)",
    "by a method": "self.depth, self.layers = self.pieces(depth)",
}


@pytest.mark.parametrize("store", RETURNED.values(), ids=RETURNED.keys())
@pytest.mark.parametrize("other", ["", "if depth > 9:\n        return 0, 0\n    "])
def test_returned_among_other_things(store: str, other: str) -> None:
    source = text("return Encoder(depth)", "depth", store)
    first, second = ("layers", "depth") if "= pieces" in store else ("depth", "layers")
    made = f"def pieces(depth):\n    {other}layers, more = nn.ModuleList([Layer() for _ in range(depth)]), 0\n"
    made += f"    return {first}, {second}\n"
    if "self.pieces" in store:
        method = made.replace("pieces(depth)", "pieces(self, depth)").replace("\n", "\n    ").rstrip(" ")
        source = source.replace(
            "    def forward(self, x):\n        for", f"    {method}\n    def forward(self, x):\n        for"
        )
    else:
        source += f"\n\n{made}"
    after = same(source)
    line = f"{store}\n        self.layers = bmt.TransformerBlockList(self.layers)\n"
    assert (line in after and "x = self.layers(x)" in after) is not bool(other)


def test_torch_stacks() -> None:
    loop = "for layer in self.layers:"
    store = "self.coder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), depth, None, False)"
    source = text("return Encoder(2)", "depth", store).replace(loop, "for layer in self.coder.layers:")
    source = source.replace("x = layer(x)", "x = layer(x)\n            y = x").replace("(2)", "(2).eval()")
    after = same(source)
    assert f"{store}\n        self.coder.layers = bmt.TransformerBlockList(self.coder.layers)\n" in after
    unused = source.replace("self.coder.layers:", "self.others:")
    assert "TransformerBlockList" not in converted(unused)
