"""Which loops carry something from member to member, and so run over blocks; which lists a loop is over."""

from __future__ import annotations

import ast

import pytest

from rewriter.analyze.model.flow import carried

from ...helpers import converted

HEAD = """import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


class Torch(nn.TransformerEncoderLayer):
    pass


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.depth = depth
        self.layers = nn.ModuleList([{member}() for _ in range(depth)])

    def forward(self, x, xs):
        seen = []
{body}
        return x, seen
"""


def net(body: str, member: str = "Layer") -> str:
    return HEAD.format(body="        " + body.replace("\n", "\n        "), member=member)


NOTHING_CARRIED = {
    "an input each": "for x, layer in zip(xs, self.layers):\n    x = layer(x)\n    seen.append(x)",
    "a piece each": "for i, layer in enumerate(self.layers):\n    part = x[i : i + 1]\n    seen.append(layer(part))",
    "a place each": "for i, layer in enumerate(self.layers):\n    xs[i] = layer(xs[i])",
    "a place by a name": "for i, layer in enumerate(self.layers):\n    j = i + 1\n    xs[j] = layer(xs[j])",
    "a sum": "total = 0\nfor layer in self.layers:\n    out = layer(x)\n    total = total + out",
    "settings": "for layer in self.layers:\n    for key in xs:\n        setattr(layer, key, None)",
    "set on both sides": "for layer in self.layers:\n    if xs:\n        y = 0\n    else:\n        y = x\n    layer(y)",
}


@pytest.mark.parametrize("body", NOTHING_CARRIED.values(), ids=NOTHING_CARRIED.keys())
def test_members_side_by_side_are_no_blocks(body: str) -> None:
    assert "TransformerBlockList" not in converted(net(body))


CARRIED = {
    "through a list": "seen.append(x)\nfor layer in self.layers:\n    y = layer(seen[-1])\n    seen.append(y)",
    "through places": "for i, layer in enumerate(self.layers):\n    xs[i] = layer(xs[i - 1])",
    "through the last place": "for layer in self.layers:\n    xs[-1] = layer(xs[-1])\n    xs.append(x)",
    "through places of each": "for layer in self.layers:\n    for i in range(2):\n        xs[i] = layer(xs[i])",
    "through another name": "for layer in self.layers:\n    y = torch.relu(x)\n    y = layer(y)\n    x = x + y",
    "pooled between": "for layer in self.layers:\n    seen.append(layer(x))\n    x = x[::2]",
    "on one side": "y = x\nfor layer in self.layers:\n    if xs:\n        y = x\n    y = layer(y)",
    "in an inner loop": "for layer in self.layers:\n    for _ in range(2):\n        x = layer(x)",
    "backwards by index": "for i in reversed(range(self.depth)):\n    x = self.layers[i](x)",
    "by other indices": "for i in xs:\n    x = self.layers[i](x)",
    "by an enumerated index": "for i, part in enumerate(xs):\n    x = self.layers[i](x + part)",
    "a slice by name": "part = slice(0, 2)\nfor layer in self.layers[part]:\n    x = layer(x)",
    "some or none": "layers = self.layers[:2] if xs else []\nfor layer in layers:\n    x = layer(x)",
    "its __call__": "for layer in self.layers:\n    x = layer.__call__(x)\n    seen.append(x)",
}


@pytest.mark.parametrize("body", CARRIED.values(), ids=CARRIED.keys())
def test_members_one_after_the_other_are_blocks(body: str) -> None:
    after = converted(net(body))
    assert "TransformerBlockList([bmt.CheckpointBlock(Layer())" in after
    assert body.replace("\n", "\n        ") in after


def test_a_subclass_of_a_torch_transformer_layer_is_a_block() -> None:
    after = converted(net("for layer in self.layers:\n    x = layer(x)", "Torch"))
    assert "bmt.CheckpointBlock(Torch())" in after
    assert "x = self.layers(x)" in after


def test_hidden_states_are_no_cache() -> None:
    body = "for layer in self.layers:\n    x = layer(x, encoder_hidden_states)"
    after = converted(net(body).replace("xs", "encoder_hidden_states"))
    assert "x = self.layers(x, encoder_hidden_states)" in after
    assert "use_checkpoint" not in after


def test_a_checkpoint_of_call_is_one_of_the_block() -> None:
    saved = "if self.training:\n        x = checkpoint(layer.__call__, x, use_reentrant=False)"
    after = converted(net(f"for layer in self.layers:\n    {saved}\n    else:\n        x = layer(x)"))
    assert "x = self.layers(x)" in after


def test_bases_in_folders_that_are_no_packages(tmp_path: object) -> None:
    from pathlib import Path

    from rewriter.convert import convert_paths
    from rewriter.plan import Options

    root = Path(str(tmp_path))
    (root / "pkg" / "extras" / "deep").mkdir(parents=True)
    (root / "pkg" / "__init__.py").write_text("")
    (root / "pkg" / "base.py").write_text("from torch import nn\n\n\nclass Base(nn.Module):\n    pass\n")
    user = root / "pkg" / "extras" / "deep" / "user.py"
    user.write_text(net("for layer in self.layers:\n    x = layer(x)").replace("Net(nn.Module)", "Net(Base)"))
    user.write_text(user.read_text().replace("import torch\n", "import torch\nfrom pkg.base import Base\n", 1))
    (result,) = convert_paths([user], Options(), [root])
    assert b"x = self.layers(x)" in result.after


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("x = f(x)", {"x"}),
        ("y = f(x)", set()),
        ("y = f(x)\nx = y + 1", {"x", "y"}),
        ("if a:\n    continue\nelse:\n    y = 1\nz = y", set()),
        ("if a:\n    y = 1\nz = y", {"y", "z"}),
        ("with f(x) as y:\n    z = y", set()),
        ("try:\n    y = 1\nexcept E:\n    pass\nz = y", {"y", "z"}),
        ("ys = [y for y in x]", set()),
        ("x += 1", {"x"}),
        ("while x:\n    y = 1\nz = y", {"y", "z"}),
        ("k = item\nitem = f(k)", set()),
        ("self.x = f(self.x)", set()),
    ],
)
def test_carried(body: str, names: set[str]) -> None:
    loop = ast.parse("for item in things:\n    " + body.replace("\n", "\n    ")).body[0]
    assert isinstance(loop, ast.For)
    assert carried(loop) == names
