# ruff: noqa: E501 - tables of code are easier to read on one line
"""Scripts that read or write parameters and gradients: what stays, what is put in ``with bmt.gathered``."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted
from .test_scripts import HEAD, LOOP

STAYS = {
    "counting": "print(sum(p.numel() for p in model.parameters() if p.requires_grad))\n",
    "freezing": "for p in model.parameters():\n    p.requires_grad = False\n",
    "grouping": "for name, p in model.named_parameters():\n    (decay if p.dim() > 1 else rest).append(p)\n",
    "element-wise": "with torch.no_grad():\n    for a, p in zip(ema.parameters(), model.parameters()):\n        a.mul_(0.9).add_(p, alpha=0.1)\n",
    "no gradient yet": "for p in model.parameters():\n    if p.grad is not None:\n        seen += 1\n",
    "gathered already": "import bmtrain as bmt\nwith bmt.gathered(model):\n    for p in model.parameters():\n        show(p.norm())\n",
    "a layer that is returned": "def linear():\n    layer = nn.Linear(4, 4)\n    nn.init.zeros_(layer.weight)\n    return layer\n",
    "another list": "for p in group['params']:\n    p.data.add_(1)\n",
}


@pytest.mark.parametrize("text", STAYS.values(), ids=STAYS.keys())
def test_stays(text: str) -> None:
    after = converted(HEAD + LOOP + text)
    inner = text.removeprefix("import bmtrain as bmt\n").replace("print(", "bmt.print_rank(")
    assert inner in after


def test_constructors_and_initialisation_methods_stay() -> None:
    head = HEAD.replace(
        "    def forward",
        "    def __init__(self):\n        super().__init__()\n        for p in self.parameters():\n            nn.init.zeros_(p)\n\n"
        "    def init_weights(self):\n        for p in self.parameters():\n            p.data.normal_()\n\n    def forward",
    )
    assert "gathered" not in converted(head + LOOP)


def test_one_rank_alone_is_only_told() -> None:
    result = convert_text(HEAD + LOOP + "if rank == 0:\n    for p in model.parameters():\n        print(p.norm())\n")
    assert b"gathered" not in result.after
    assert [f.code for f in result.reported] == ["BMT023", "BMT036"]


GATHERED = {
    "initialisation": (
        "for p in model.parameters():\n    if p.dim() > 1:\n        nn.init.xavier_uniform_(p)\n",
        "with bmt.gathered(model, write=True):\n    for p in model.parameters():\n        if p.dim() > 1:\n            nn.init.xavier_uniform_(p)\n",
    ),
    "initialisation of modules": (
        "for m in model.modules():\n    if isinstance(m, nn.Linear):\n        m.weight.data.normal_(0, 0.02)\n",
        "with bmt.gathered(model, write=True):\n    for m in model.modules():\n",
    ),
    "initialisation of one": (
        "nn.init.zeros_(model.head.weight)\n",
        "with bmt.gathered(model.head.weight, write=True):\n    nn.init.zeros_(model.head.weight)\n",
    ),
    "a histogram": (
        "for name, p in model.named_parameters():\n    writer.add_histogram(name, p, 1)\n    writer.add_histogram(name, p.grad, 1)\n",
        "with bmt.gathered(model):\n    for name, p in model.named_parameters():\n        if bmt.rank() == 0:\n            writer.add_histogram(name, p, 1)\n"
        "        value = bmt.gather_grad(p)\n        if bmt.rank() == 0:\n            writer.add_histogram(name, value, 1)\n",
    ),
    "copies": (
        "for name, p in model.named_parameters():\n    shadow[name] = p.data.clone()\n",
        "with bmt.gathered(model):\n    for name, p in model.named_parameters():\n        shadow[name] = p.data.clone()\n",
    ),
    "values that are kept": (
        "for name, p in model.named_parameters():\n    backup[name] = p.data\n    p.data = shadow[name]\n",
        "with bmt.gathered(model, write=True):\n    for name, p in model.named_parameters():\n        backup[name] = p.data.clone()\n",
    ),
    "a model that is returned": (
        "def build():\n    net = Net()\n    nn.init.zeros_(net.head.weight)\n    return net\n",
        "    with bmt.gathered(net.head.weight, write=True):\n        nn.init.zeros_(net.head.weight)\n",
    ),
    "views that are kept": (
        "averages = [p.detach().float() for p in model.parameters()]\n",
        "with bmt.gathered(model):\n    averages = [p.detach().float().clone() for p in model.parameters()]\n",
    ),
    "values by another name": (
        "for a, p in zip(ema.parameters(), model.parameters()):\n    old, new = a.data, p.data\n    old.lerp_(new, 0.1)\n",
        "with bmt.gathered(ema, write=True), bmt.gathered(model, write=True):\n    for a, p in zip(ema.parameters(), model.parameters()):\n"
        "        old, new = a.data, p.data\n",
    ),
    "momentum of values": (
        "for a, p in zip(ema.parameters(), model.parameters()):\n    a.data = a.data * 0.9 + p.data * 0.1\n",
        "with bmt.gathered(ema, write=True), bmt.gathered(model, write=True):\n    for a, p in",
    ),
    "clipped weights": (
        "for p in model.parameters():\n    p.data.clamp_(-1, 1)\n",
        "with torch.no_grad():\n    for p in model.parameters():\n        p.clamp_(-1, 1)\n",
    ),
    "averages": (
        "@torch.no_grad()\ndef update(ema, model):\n    for a, p in zip(ema.parameters(), model.parameters()):\n        a.data.mul_(0.9).add_(p.data, alpha=0.1)\n",
        "def update(ema, model):\n    for a, p in zip(ema.parameters(), model.parameters()):\n        a.mul_(0.9).add_(p, alpha=0.1)\n",
    ),
    "a norm": (
        "norm = sum(p.data.norm() ** 2 for p in model.parameters())\n",
        "with bmt.gathered(model):\n    norm = sum(p.data.norm() ** 2 for p in model.parameters())\n",
    ),
    "a norm of gradients": (
        "total = 0\nfor p in model.parameters():\n    if p.grad is not None:\n        total += p.grad.data.norm(2).item() ** 2\n",
        "    if p.grad is not None:\n        total += bmt.gather_grad(p).data.norm(2).item() ** 2\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), GATHERED.values(), ids=GATHERED.keys())
def test_gathered(text: str, expected: str) -> None:
    assert expected in converted(HEAD + LOOP + text)


ON_ONE_RANK = {
    "a helper reads parameters": (
        "def norms(net):\n    total = 0\n    for p in net.parameters():\n        total += p.norm()\n    return total\n\n\n",
        "if rank == 0:\n    writer.add_scalar('norm', norms(model), 1)\n",
        "value = norms(model)\nif bmt.rank() == 0:\n    writer.add_scalar('norm', value, 1)\n",
    ),
    "a helper of a helper": (
        "def norm(net):\n    return max(p.abs().max() for p in net.parameters())\n\n\ndef show(net):\n    total = norm(net)\n    print(total)\n\n\n",
        "if rank == 0:\n    show(model)\n",
        "\nshow(model)\n",
    ),
    "a helper reads gradients": (
        "def norms(net):\n    return [p.grad.norm() for p in net.parameters() if p.grad is not None]\n\n\n",
        "if step % 10 == 0 and rank == 0:\n    print(norms(model))\n",
        "if step % 10 == 0:\n    bmt.print_rank(norms(model))\n",
    ),
    "its own guard keeps it to one rank": (
        "def norms(net):\n    if rank == 0:\n        for p in net.parameters():\n            print(p.norm())\n\n\n",
        "if rank == 0:\n    norms(model)\n",
        "if rank == 0:\n    norms(model)\n",
    ),
    "a helper that only counts": (
        "def count(net):\n    return sum(p.numel() for p in net.parameters())\n\n\n",
        "if rank == 0:\n    print(count(model))\n",
        "if rank == 0:\n    print(count(model))\n",
    ),
}


@pytest.mark.parametrize(("helper", "call", "expected"), ON_ONE_RANK.values(), ids=ON_ONE_RANK.keys())
def test_helpers_that_gather_are_called_on_every_rank(helper: str, call: str, expected: str) -> None:
    """In one run: what the converter itself makes a collective opens the guards around its calls."""
    assert expected in converted(HEAD + helper + LOOP + call)


def test_data_of_data() -> None:
    text = "for p in model.parameters():\n    p.data.data.zero_()\n"
    assert "with bmt.gathered(model, write=True):\n    for p" in converted(HEAD + LOOP + text)
