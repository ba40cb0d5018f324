"""What ``bmt-convert --tensor-parallel`` splits, with other features: every pair occurs, beside plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from covering import Row, covering_rows
from ranks import run_ranks
from test_converted import NOISE, built, converted, without_dropout
from test_split_features_together import MESHES, wrong_beside

INIT = "        self.head = nn.Linear(config.width, 14)\n"
KINDS = {
    "plain": "",
    "tied": "        self.head.weight = self.embedding.weight\n",
    "frozen": "        self.embedding.requires_grad_(False)\n"
    "        self.layers[0].requires_grad_(False)\n"
    "        for name, p in self.layers[1].named_parameters():\n"
    "            p.requires_grad_(p.dim() > 1)\n",
    "lora": "        self.requires_grad_(False)\n"
    "        self.a = nn.ModuleList([nn.Linear(config.width, 4, bias=False) for _ in self.layers])\n"
    "        self.b = nn.ModuleList([nn.Linear(4, config.width, bias=False) for _ in self.layers])\n",
}
"""What the constructor goes on with."""
FORWARDS = {"lora": ("            x = layer(x)\n", "            x = layer(x) + self.b[number](self.a[number](x))\n")}
FACTORS: dict[str, list[Any]] = {
    "mesh": MESHES,
    "style": ["nanogpt", "llama", "bert", "vit", "neox"],
    "kind": list(KINDS),
    "precision": ["fp32", "autocast bf16", "autocast fp16", "bf16 model", "precision bf16"],
    "compiled": [False, True],
    "recompute": [True, False, None],
    "accumulate": [1, 3],
    "clip": [False, True],
    "optimizer": ["ours", "torch's", "both"],
}
CELLS = covering_rows(FACTORS)


def text_of(cell: Row) -> str:
    text = without_dropout(cell["style"])
    assert INIT in text
    text = text.replace(INIT, INIT + KINDS[cell["kind"]])
    if cell["kind"] == "lora":
        text = text.replace(
            "        for layer in self.layers:\n", "        for number, layer in enumerate(self.layers):\n"
        )
        text = text.replace(*FORWARDS["lora"])
    for name in "qk":  # so that the script runs in bf16
        text = text.replace(
            f"{name} * cos + rotate_half({name}) * sin", f"({name} * cos + rotate_half({name}) * sin).to({name}.dtype)"
        )
    return text


def wrong_in(cell: Row, text: str, changed: str) -> list[str]:
    torch._dynamo.reset()
    block = "bmt.CheckpointBlock(Block(config))"
    assert block in changed, changed
    changed = changed.replace(block, f"bmt.Block(Block(config), use_checkpoint={cell['recompute']})")
    reference, model = built(text), built(changed)
    assert sum(bool(getattr(p, "_tp_mode", False)) for p in model.parameters()) >= 8
    # a third of the packed bias is the keys', which low precision's noise moves
    noise = NOISE if cell["precision"] == "fp32" else (*NOISE, "c_attn.bias")
    return wrong_beside(cell, reference, model, noise)


def wrong_cells(cells: list[tuple[Row, str, str]]) -> list[tuple[Row, list[str]]]:
    found = []
    for cell, text, changed in cells:
        try:
            wrong = wrong_in(cell, text, changed)
        except Exception as error:
            raise AssertionError(str(cell)) from error
        if wrong:
            found.append((cell, wrong))
    return found


@pytest.mark.parametrize("mesh", [MESHES[0], *(pytest.param(m, marks=pytest.mark.long) for m in MESHES[1:])], ids=str)
@pytest.mark.parametrize("policy", [None, pytest.param("bf16", marks=pytest.mark.long)])
def test_features_together(mesh: tuple[int, int | None], policy: str | None) -> None:
    chosen = [c for c in CELLS if c["mesh"] == mesh and (c["precision"] == "precision bf16") == (policy is not None)]
    assert chosen
    init = {"tp_size": 2, "shard_size": mesh[1]} | ({"precision": policy} if policy else {})
    models = [(cell, text, converted(text)) for cell in chosen for text in [text_of(cell)]]
    for found in run_ranks(mesh[0], wrong_cells, models, init=init, timeout=280):
        assert not found, "\n".join(f"{cell}\n    " + "\n    ".join(wrong[:8]) for cell, wrong in found)
