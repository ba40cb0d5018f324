# ruff: noqa: E501 - tables of code are easier to read on one line
"""Generated models, converted and run against the original: same outputs, same state-dict keys, never a wrong safe edit."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ... import stub
from ...helpers import converted

BLOCKS = '''{imports}
import copy


def same(thing):
    return thing


class Many({nn}.Sequential):
    def forward(self, *args):
        for part in self:
            args = part(*args)
        return args


def repeat(count, make):
    return Many(*[make(i) for i in range(count)])


def clones(module, count):
    return {nn}.ModuleList([copy.deepcopy(module) for _ in range(count)])


class Block({module}):
    """One value in, one value out; keywords, extras and a second value are optional."""

    def __init__(self, index):
        super().__init__()
        self.linear = {nn}.Linear(4, 4)
        self.index = index

    def forward(self, x, scale=1.0, *, shift=0.0):
        return torch.tanh(self.linear(x)) * scale + shift + 0.1 * self.index


class Two({module}):
    def __init__(self, index):
        super().__init__()
        self.linear = {nn}.Linear(4, 4)

    def forward(self, x, y, scale=1.0):
        return self.linear(x) + y * scale, torch.tanh(y + x)


{decorator}class Net({module}):
    def __init__(self, depth, block_fn={block}):
        super().__init__()
{build}

    {decorator}def forward(self, x, y, scale, shift):
        seen = []
{loop}
        return x, y, seen


class Outer({module}):
    def __init__(self, depth):
        super().__init__()
        self.gain = {nn}.Parameter(torch.ones(4))
        self.net = Net(depth)

    def forward(self, x, y, scale, shift):
        return self.net(x * self.gain, y, scale, shift)
'''

IMPORTS = [
    ("import torch", "torch.nn", "torch.nn.Module"),
    ("import torch\nfrom torch import nn", "nn", "nn.Module"),
    ("import torch\nimport torch.nn as tnn", "tnn", "tnn.Module"),
    ("import torch\nfrom torch import nn\nfrom torch.nn import Module as M, ModuleList", "nn", "M"),
]
BUILDS = [
    "self.layers = {nn}.ModuleList([{block}(i) for i in range(depth)])",
    "self.layers = {nn}.ModuleList({block}(i) for i in range(depth))",
    "self.layers = {nn}.ModuleList()  # empty\nfor i in range(depth):\n    self.layers.append({block}(i))",
    "blocks = []\nfor i in range(depth):\n    block = {block}(i)\n    blocks.append(block)\nself.layers = {nn}.ModuleList(blocks)",
    "self.layers = {nn}.ModuleList([\n    {block}(0),  # first\n    {block}(1),\n])",
    "self.layers = {nn}.ModuleList([])\nself.layers.extend([{block}(i) for i in range(depth)])",
    "self.layers = {nn}.ModuleList([])\nself.layers += [{block}(i) for i in range(depth)]",
    "self.layers = {nn}.ModuleList([{block}(i) if i else {block}(7) for i in range(depth)])",
    "self.layers = {nn}.Sequential(*[{block}(i) for i in range(depth)])",
    "self.layers = {nn}.ModuleList([{block}(i) for i in range(depth)])\nself.layers = self.layers[:1]",
    "clone = {block}(1)\nself.layers = {nn}.ModuleList([copy.deepcopy(clone) for _ in range(depth)])",
    "self.layers = clones({block}(1), depth)",
    "self.layers = {nn}.ModuleList([block_fn(i) for i in range(depth)])",
    "self.layers = {nn}.Sequential(*[block_fn(i) for i in range(depth)])",
    "self.layers = {nn}.ModuleList([{block}(i) for i in range(depth)] + [{block}(9)])",
    "self.layers = {nn}.ModuleList([{nn}.Sequential({block}(i)) for i in range(depth)])",
    "self.layers = {nn}.ModuleDict({{str(i): {block}(i) for i in range(depth)}})",
    "self.layers = {nn}.ModuleDict()\nfor i in range(depth):\n    self.layers[f'layer{{i}}'] = {block}(i)",
    "self.layers = Many(*[{block}(i) for i in range(depth)])",
    "self.layers = repeat(depth, lambda i: {block}(i))",
    "self.layers = {nn}.Sequential()\nfor i in range(depth):\n    self.layers.add_module(f'part{{i}}', {block}(i))",
    "self.layers = {nn}.ModuleList([{block}(0), {nn}.Identity(), {block}(1)])",
    "self.layers = {nn}.ModuleList([\n    # first\n    {block}(\n        0  # inside\n    ),\n])  # last",
    "shared = {block}(1)\nself.layers = {nn}.ModuleList([shared for _ in range(depth)])",
]
HEADERS = [
    ("for layer in self.layers:", "layer"),
    ("for i, layer in enumerate(self.layers):", "layer"),
    ("for i in range(len(self.layers)):", "self.layers[i]"),
    ("layers = self.layers\nfor layer in layers:", "layer"),
    ("for layer in self.layers[:2]:", "layer"),
    ("for layer in reversed(self.layers):", "layer"),
    ("for layer, more in zip(self.layers, (1, 2, 3, 4)):", "layer"),
    ("for i, (more, layer) in enumerate(zip((1, 2, 3, 4), self.layers)):", "layer"),
    ("for i in range(len(self.layers)):\n    layer = self.layers[i]", "layer"),
    ("for layer in self.layers.values():", "layer"),
    ("for layer in (  # all\n    self.layers\n):  # of them", "layer"),
]
BODIES = [
    "x = {m}(x)",
    "x = {m}(x, scale)",
    "x = {m}(x, scale=scale)  # comment",
    "x = {m}(x, shift=shift, scale=scale)",
    "x = {m}(x, 0.5, shift=-1.0)",
    "x = {m}(x=x)",
    "x = {m}(x, x.mean())",
    "x = {m}(x, scale=torch.rand(()))",
    "x = {m}(x)\nseen.append(x)",
    "x = x + {m}(x)",
    "scale = {m}(x, scale)",
    "x = {m}(y)",
    "if scale > 0:\n    x = {m}(x)",
    "x = {m}(\n    x,\n    # inside\n    scale,\n)",
    "if self.training:\n    x = {m}(x, scale)\nelse:\n    x = {m}(x, scale)",
    "if self.training:\n    x = torch.utils.checkpoint.checkpoint({m}, x, scale, use_reentrant=False)\nelse:\n    x = {m}(x, scale)",
    "if self.training:\n    x = torch.utils.checkpoint.checkpoint({m}, x, 2.0, use_reentrant=False)\nelse:\n    x = {m}(x, scale)",
]
PAIR_BODIES = [
    "x, y = {m}(x, y)",
    "x, y = {m}(x, y, scale)",
    "y, x = {m}(y, x, scale=scale)",
    "y, x = {m}(x, y)",
    "x, _ = {m}(x, y)",
    "x = {m}(x, y)[0]",
]
AFTER = [
    "",
    "\nseen.append(len(self.layers))",
    "\nseen.append(x)\nfor layer in self.layers:\n    seen.append(layer)\nseen.clear()",
]
TAILS = ["", "\nelse:\n    x = x * 2"]


def indented(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line if line else line for line in text.split("\n"))


def filled(imports: str, nn: str, module: str, build: str, loop: str, decorator: str = "", block: str = "Block") -> str:
    inner = decorator.replace("\n", "\n    ")
    text = BLOCKS.replace("    {decorator}def", f"    {inner}def").replace("{decorator}class", f"{decorator}class")
    return text.format(imports=imports, nn=nn, module=module, build=build, loop=loop, block=block)


@st.composite
def models(draw: st.DrawFn) -> str:
    imports, nn, module = draw(st.sampled_from(IMPORTS))
    two = draw(st.booleans())
    header, member = draw(st.sampled_from(HEADERS))
    body = draw(st.sampled_from(PAIR_BODIES if two else BODIES)).replace("{m}", member)
    after = draw(st.sampled_from(AFTER))
    loop = header + "\n" + indented(body, 4) + draw(st.sampled_from(TAILS)) + after
    block = "Two" if two else "Block"
    build = draw(st.sampled_from(BUILDS)).replace("{nn}", nn).replace("{block}", block)
    build = build.replace("{{", "{").replace("}}", "}")
    decorator = draw(st.sampled_from(["", "", "@same\n", "@same  # twice\n@same\n"]))
    text = filled(imports, nn, module, indented(build, 8), indented(loop, 8), decorator, block)
    return draw(st.sampled_from([text, text.replace("    ", "\t"), text.replace("\n", "\r\n")]))


def run(text: str) -> tuple[list[str], object]:
    """State-dict keys and outputs of a file's model."""
    space: dict[str, object] = {}
    torch.manual_seed(0)
    with mock.patch.dict(sys.modules, {"bmtrain": stub.module()}):
        exec(compile(text, "model", "exec"), space)
    net = space["Outer"](2)  # type: ignore[operator]
    x, y = torch.ones(2, 4), torch.linspace(0, 1, 8).view(2, 4)
    torch.manual_seed(1)
    try:
        results = [net.train(mode)(x, y, torch.tensor(0.5), 0.25) for mode in (True, False)]
    except Exception as error:
        return list(net.state_dict()), type(error)
    return list(net.state_dict()), results


def flat(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    else:
        yield value


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models())
def test_converted_models_compute_the_same(text: str) -> None:
    after = converted(text)
    ast.parse(after)
    keys, outputs = run(text)
    converted_keys, converted_outputs = run(after)
    assert keys == converted_keys
    if isinstance(outputs, type):
        assert outputs is converted_outputs
        return
    for one, other in zip(flat(outputs), flat(converted_outputs), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("header", "body", "called"),
    [
        ("for layer in self.layers:", "x = layer(x)", True),
        ("for layer in self.layers:", "x = layer(x, scale=scale)", True),
        ("for _, layer in enumerate(self.layers):", "x = layer(x)", True),
        ("for i in range(len(self.layers)):", "x = self.layers[i](x)", True),
        ("for i in range(2):", "x = self.layers[i](x)", False),
        ("for layer in self.layers[:1]:", "x = layer(x)", False),
        ("for layer in self.layers:", "x = layer(x, torch.rand(()))", False),
        ("for layer in self.layers:", "x = layer(x, [1])", False),
        ("for layer in self.layers:", "x = layer(x, layer.index)", False),
        ("for layer in self.layers:", "x = layer(x)\n    y = y + x", False),
    ],
)
def test_which_loops_become_calls(header: str, body: str, called: bool) -> None:
    build = "self.layers = nn.ModuleList([Block(i) for i in range(depth)])"
    text = filled(
        "import torch\nfrom torch import nn",
        "nn",
        "nn.Module",
        indented(build, 8),
        indented(f"{header}\n    {body}", 8),
    )
    assert ("self.layers(x" in converted(text)) is called
    assert run(text)[0] == run(converted(text))[0]
