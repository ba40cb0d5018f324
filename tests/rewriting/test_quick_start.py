"""The quick start, from ordinary torch and from each of its steps."""

from __future__ import annotations

import pytest

from .helpers import converted

TEMPLATE = """import torch
{imports}

class MyModule({base}):
    def __init__(self):
        super().__init__()
        self.param = {parameter}(torch.empty(1024))
        self.module_list = {container}([
            {block},
            {block},
            {block}
        ])

    def forward(self):
        x = self.param
{loop}
        return x
"""
LOOP = "        for module in self.module_list:\n            x = module(x, 1, 2, 3)"
START = {
    "imports": "",
    "base": "torch.nn.Module",
    "parameter": "torch.nn.Parameter",
    "container": "torch.nn.ModuleList",
    "block": "SomeTransformerBlock()",
    "loop": LOOP,
}
END = {
    "imports": "import bmtrain as bmt\n",
    "base": "bmt.DistributedModule",
    "parameter": "bmt.DistributedParameter",
    "container": "bmt.TransformerBlockList",
    "block": "bmt.CheckpointBlock(SomeTransformerBlock())",
    "loop": "        x = self.module_list(x, 1, 2, 3)",
}
STEPS = [
    (),
    ("base",),
    ("base", "parameter"),
    ("base", "parameter", "block"),
    ("base", "parameter", "block", "container"),
    ("base", "parameter", "block", "container", "loop"),
    ("block",),
    ("parameter",),
]


@pytest.mark.parametrize("done", STEPS, ids=lambda done: "+".join(done) or "plain")
def test_every_step(done: tuple[str, ...]) -> None:
    values = {**START, **{name: END[name] for name in done}}
    if done:
        values["imports"] = END["imports"]
    assert converted(TEMPLATE.format(**values)) == TEMPLATE.format(**END)
