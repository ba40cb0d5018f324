"""Which lists become stacks of blocks, by how they are built and used; what stays first."""

from __future__ import annotations

import pytest

from ...helpers import converted

HEAD = """import copy
import torch
from torch import nn
from collections import OrderedDict


class Layer(nn.Module):
    def __init__(self, index=0):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)

    def step(self, x):
        return self.linear(x)


class Many(nn.Sequential):
    def forward(self, x):
        for part in self:
            x = part(x)
        return x


def repeat(count, make):
    return Many(*[make(i) for i in range(count)])


def clones(module, count):
    return nn.ModuleList([copy.deepcopy(module) for _ in range(count)])


class Net(nn.Module):
    def __init__(self, depth, block_fn=Layer):
        super().__init__()
{build}

    def forward(self, x):
{loop}
        return x
"""
LOOP = "for layer in self.layers:\n    x = layer(x)"


def written(build: str, loop: str = LOOP) -> str:
    """The statements of the constructor and of ``forward`` after conversion."""
    indent = {"build": build.replace("\n", "\n        "), "loop": loop.replace("\n", "\n        ")}
    after = converted(HEAD.format(build="        " + indent["build"], loop="        " + indent["loop"]))
    inside = after[after.index("class Net") :]
    constructor, _, forward = inside.partition("    def forward(self, x):\n")
    lines = [*constructor.split("__init__()\n", 1)[1].splitlines(), *forward.splitlines()[:-1]]
    return "\n".join(line[8:] for line in lines if line.strip())


STAYS = {
    "pairs": "self.layers = nn.ModuleList([nn.ModuleList([Layer(), Layer()]) for _ in range(depth)])",
    "one object many times": "shared = Layer()\nself.layers = nn.ModuleList([shared for _ in range(depth)])",
    "single torch layers": "self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])",
    "plain namespaces": "self.layers = nn.ModuleList([nn.Module() for _ in range(depth)])",
    "given from outside": "self.layers = block_fn",
    "a ModuleList in some cases": "layers = []\nif depth:\n    layers = nn.ModuleList([Layer()])\nself.layers = layers",
    "one object many times inside a list": "part = Layer()\nself.layers = nn.ModuleList([Layer(), *[part] * depth])",
    "something else afterwards": "layers = [Layer()]\nlayers = nn.ModuleList(layers)\nfor layers in block_fn:\n"
    "    pass\nself.layers = layers",
    "names of single layers": "self.layers = nn.Sequential(OrderedDict(a=nn.Linear(4, 4)))",
    "names of what is not known": "self.layers = nn.Sequential(OrderedDict(depth))",
    "a dict of single layers": "self.layers = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in range(depth)})",
}


@pytest.mark.parametrize("build", STAYS.values(), ids=STAYS.keys())
def test_stays(build: str) -> None:
    assert written(build) == f"{build}\n{LOOP}"


BECOMES = {
    "members that are Sequentials": (
        "self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth)])",
        "self.layers = bmt.TransformerBlockList("
        "[bmt.CheckpointBlock(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) for _ in range(depth)])",
    ),
    "two lists": (
        "self.layers = nn.ModuleList([Layer(i) for i in range(depth)] + [Layer()])",
        "self.layers = bmt.TransformerBlockList("
        "[bmt.CheckpointBlock(Layer(i)) for i in range(depth)] + [bmt.CheckpointBlock(Layer())])",
    ),
    "a class given as an argument": (
        "self.layers = nn.Sequential(*[block_fn(i) for i in range(depth)])",
        "self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(block_fn(i)) for i in range(depth)])",
    ),
    "a list inside a list": (
        "self.layers = nn.ModuleList([Layer(), *[Layer(i) for i in range(depth)], Layer()])",
        "self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()), "
        "*[bmt.CheckpointBlock(Layer(i)) for i in range(depth)], bmt.CheckpointBlock(Layer())])",
    ),
    "a list and then a ModuleList under one name": (
        "layers = []\nfor i in range(depth):\n    layers.append(Layer(i))\n"
        "layers = nn.ModuleList(layers)\nself.layers = layers",
        "layers = []\nfor i in range(depth):\n    layers.append(bmt.CheckpointBlock(Layer(i)))\n"
        "layers = bmt.TransformerBlockList(layers)\nself.layers = layers",
    ),
    "a helper that clones": (
        "self.layers = clones(Layer(), depth)",
        "self.layers = bmt.TransformerBlockList(clones(Layer(), depth))",
    ),
}


@pytest.mark.parametrize(("build", "after"), BECOMES.values(), ids=BECOMES.keys())
def test_becomes_a_list(build: str, after: str) -> None:
    assert written(build) == f"{after}\nx = self.layers(x)"


KEPT = {
    "a dict": (
        "self.layers = nn.ModuleDict()\nfor i in range(depth):\n    self.layers[str(i)] = Layer(i)",
        "self.layers = nn.ModuleDict()\nfor i in range(depth):\n"
        "    self.layers[str(i)] = bmt.CheckpointBlock(Layer(i))",
        "for layer in self.layers.values():\n    x = layer(x)",
    ),
    "a dict comprehension": (
        "self.layers = nn.ModuleDict({str(i): Layer(i) for i in range(depth)})",
        "self.layers = nn.ModuleDict({str(i): bmt.CheckpointBlock(Layer(i)) for i in range(depth)})",
        "for layer in self.layers.values():\n    x = layer(x)",
    ),
    "a dict of what another list holds": (
        "made = [Layer(i) for i in range(depth)]\nself.layers = nn.ModuleDict({str(i): made[i] for i in range(depth)})",
        "made = [Layer(i) for i in range(depth)]\n"
        "self.layers = nn.ModuleDict({str(i): bmt.CheckpointBlock(made[i]) for i in range(depth)})",
        "for layer in self.layers.values():\n    x = layer(x)",
    ),
    "a container class": (
        "self.layers = Many(*[Layer(i) for i in range(depth)])",
        "self.layers = Many(*[bmt.CheckpointBlock(Layer(i)) for i in range(depth)])",
        LOOP,
    ),
    "a container class that is called": (
        "self.layers = Many(*[Layer(i) for i in range(depth)])",
        "self.layers = Many(*[bmt.CheckpointBlock(Layer(i)) for i in range(depth)])",
        "x = self.layers(x)",
    ),
    "a helper that is given a lambda": (
        "self.layers = repeat(depth, lambda i: Layer(i))",
        "self.layers = repeat(depth, lambda i: bmt.CheckpointBlock(Layer(i)))",
        LOOP,
    ),
    "None among blocks": (
        "self.layers = nn.ModuleList([Layer(0), None])",
        "self.layers = nn.ModuleList([bmt.CheckpointBlock(Layer(0)), None])",
        "for layer in self.layers:\n    x = layer(x) if layer else x",
    ),
    "names in a Sequential": (
        "self.layers = nn.Sequential()\nfor i in range(depth):\n    self.layers.add_module(f'block{i}', Layer(i))",
        "self.layers = nn.Sequential()\nfor i in range(depth):\n"
        "    self.layers.add_module(f'block{i}', bmt.CheckpointBlock(Layer(i)))",
        LOOP,
    ),
    "blocks between layers": (
        "self.layers = nn.Sequential(nn.Linear(4, 4), Layer(0))",
        "self.layers = nn.Sequential(nn.Linear(4, 4), bmt.CheckpointBlock(Layer(0)))",
        LOOP,
    ),
}


@pytest.mark.parametrize(("build", "after", "loop"), KEPT.values(), ids=KEPT.keys())
def test_container_stays_and_its_members_become_blocks(build: str, after: str, loop: str) -> None:
    assert written(build, loop) == f"{after}\n{loop}"


PAIRS = "self.layers = nn.ModuleList([nn.ModuleList([Layer(), nn.ReLU()]) for _ in range(depth)])"
TAKEN_APART = {
    "unpacked": "for attn, ff in self.layers:\n    x = ff(attn(x))",
    "unpacked with another list": "for (attn, ff), scale in zip(self.layers, (1, 2)):\n    x = ff(attn(x)) * scale",
    "unpacked in the body": "for layer in self.layers:\n    attn, ff = layer\n    x = ff(attn(x))",
    "indexed": "for layer in self.layers:\n    x = layer[1](layer[0](x))",
    "run one after the other": "for layer in self.layers:\n    for part in layer:\n        x = part(x)",
    "run with numbers": "for layer in self.layers:\n    for i, part in enumerate(layer):\n        x = part(x) * i",
    "by two indices": "for i in range(depth):\n    for j in range(2):\n        x = self.layers[i][j](x)",
}
LEVELS = """self.layers = nn.ModuleList()
for _ in range(depth):
    level = nn.Module()
    level.up = Layer()
    level.parts = nn.ModuleList([Layer(), Layer()])
    {add}"""
LEVEL_LOOPS = {
    "members": "for level in self.layers:\n    x = level.up(x)",
    "indices": "for i in range(depth):\n    x = self.layers[i].parts[0](x)",
    "parts": "for level in reversed(self.layers):\n    for part in level.parts:\n        x = part(x)",
}


def test_levels_that_are_only_set_up_stay() -> None:
    levels = LEVELS.format(add="self.layers.append(level)")
    assert "CheckpointBlock" not in written(levels, "for level in self.layers:\n    level.train(True)")
    shared = levels.replace("level = nn.Module()", "level = level or nn.Module()")
    assert "TransformerBlockList" not in written(shared, LEVEL_LOOPS["members"])


@pytest.mark.parametrize("loop", LEVEL_LOOPS.values(), ids=LEVEL_LOOPS.keys())
@pytest.mark.parametrize("add", ["self.layers.append(level)", "self.layers.insert(0, level)"])
def test_levels(loop: str, add: str) -> None:
    levels = LEVELS.format(add=add)
    assert written(levels, loop) == f"{levels.replace('nn.ModuleList()', 'bmt.TransformerBlockList([])')}\n{loop}"


@pytest.mark.parametrize("loop", TAKEN_APART.values(), ids=TAKEN_APART.keys())
def test_pairs(loop: str) -> None:
    after = PAIRS.replace(
        "nn.ModuleList([nn.ModuleList(", "bmt.TransformerBlockList([bmt.CheckpointBlock(nn.ModuleList("
    )
    assert written(PAIRS, loop) == f"{after.replace('])', ']))', 1)}\n{loop}"
    assert "CheckpointBlock" not in written(PAIRS.replace("layers", "norms"), loop.replace("layers", "norms"))


LOOPS = {
    "a name for the member": "for i in range(len(self.layers)):\n    layer = self.layers[i]\n    x = layer(x)",
    "zip inside enumerate": "for i, (p, layer) in enumerate(zip((0, 1), self.layers)):\n    x = layer(x) * i",
    "the second of two lists": "for norm, layer in zip(self.norms, self.layers):\n    x = layer(norm(x))",
    "moved first": "for layer in self.layers:\n    layer.to(x.device)\n    x = layer(x)",
    "by steps elsewhere": (
        "if depth == 1:\n    for layer in self.layers:\n        x = layer.step(x)\n"
        "for layer in self.layers:\n    x = layer(x)\n    seen = x"
    ),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_loops_that_a_stack_allows(loop: str) -> None:
    build = "self.layers = nn.ModuleList([Layer(i) for i in range(depth)])"
    after = build.replace("nn.ModuleList", "bmt.TransformerBlockList").replace(
        "Layer(i)", "bmt.CheckpointBlock(Layer(i))"
    )
    assert written(build, loop) == f"{after}\n{loop}"


def test_parts_called_beside_the_block() -> None:
    build = "self.layers = nn.ModuleList([Layer(i) for i in range(depth)])"
    loop = "for layer in self.layers:\n    x = layer(x)\n    x = layer.linear.forward(x)"
    assert written(build, loop) == f"{build}\n{loop}"


INNER = """

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Layer() for _ in range(2)])

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Outer(nn.Module):
    def __init__(self, depth, make=Inner):
        super().__init__()
        {build}

    def forward(self, x):
        for layer in self.cell:
            x = layer(x)
        return x
"""


@pytest.mark.parametrize(
    "build",
    [
        "self.cell = nn.Sequential()\n        for index in range(depth):\n            layer = Inner()\n"
        "            self.cell.add_module(str(index), layer)",
        "self.cell = nn.ModuleList([make() for _ in range(depth)])",
    ],
)
def test_lists_inside_blocks_stay_in_a_second_run(build: str) -> None:
    text = HEAD.format(build="        self.layers = None", loop="        pass") + INNER.format(build=build)
    after = converted(text)  # which converts twice
    assert "CheckpointBlock(" in after and "self.parts = nn.ModuleList(" in after


def test_lists_inside_blocks_of_a_factory_stay() -> None:
    text = """from torch import nn


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Other(nn.Module):
    pass


def make(kind):
    if kind:
        return Other()
    return Inner()


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList([make(i) for i in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""
    after = converted(text)
    assert "self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(make(i)) for i in range(depth)])" in after
    assert "self.parts = nn.ModuleList(" in after and "for part in self.parts:" in after
