"""A loop that trains on parts of each batch has fewer of them on a rank: it is reported."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.plan import Options

SCRIPT = """import torch
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for batch in DataLoader(data, batch_size=8, collate_fn=grouped):
{body}
"""
TRAIN = "opt.zero_grad()\n    loss = net({x}).mean()\n    loss.backward()\n    opt.step()"
PARTS = {
    "batches of a group": "for x in batch:\n    " + TRAIN.format(x="x"),
    "counted": "for i, x in enumerate(batch):\n    " + TRAIN.format(x="x"),
    "split": "x, y = batch\nfor part in x.split(4):\n    " + TRAIN.format(x="part"),
    "slices": "x = batch['x']\nfor i in range(0, len(x), 4):\n    " + TRAIN.format(x="x[i : i + 4]"),
    "pairs": "x, y = batch\nfor a, b in zip(x.split(4), y.split(4)):\n    " + TRAIN.format(x="a"),
    "accumulated": "opt.zero_grad()\nfor x in batch:\n    (net(x).mean() / 4).backward()\nopt.step()",
    "a size": "n = batch.size(0)\nfor i in range(n):\n    " + TRAIN.format(x="batch[i]"),
}
WHOLE = {
    "as many": "for x in batch.chunk(2):\n    " + TRAIN.format(x="x"),
    "several steps": "for _ in range(3):\n    " + TRAIN.format(x="batch"),
    "heads": "for head in heads:\n    " + TRAIN.format(x="head(batch)"),
    "nothing trained": TRAIN.format(x="batch").replace("\n    ", "\n") + "\nfor x in batch:\n    note(x)",
    "by key": "for name, x in batch.items():\n    " + TRAIN.format(x="x"),
}


def reported(body: str) -> bool:
    text = SCRIPT.format(body="".join(f"    {line}\n" for line in body.splitlines()))
    result = convert_text(text, Options())
    assert not result.error
    return any("trains on parts of a batch" in finding.message for finding in result.reported)


@pytest.mark.parametrize("body", PARTS.values(), ids=PARTS.keys())
def test_parts_of_which_a_share_has_fewer(body: str) -> None:
    assert reported(body)


@pytest.mark.parametrize("body", WHOLE.values(), ids=WHOLE.keys())
def test_what_is_as_often_on_a_share(body: str) -> None:
    assert not reported(body)


COUNTED = {
    "steps": ("for x in batch:\n    " + TRAIN.format(x="x") + "\n    step += 1", False),
    "steps, numbered": ("for i, x in enumerate(batch):\n    " + TRAIN.format(x="x") + "\n    step += 1", False),
    "steps of slices": (
        "for i in range(0, len(batch), 4):\n    " + TRAIN.format(x="batch[i : i + 4]") + "\n    step += 1", False,
    ),
    "items": (TRAIN.format(x="batch").replace("\n    ", "\n") + "\nfor x in batch:\n    step += 1", True),
    "items that are as asked": (
        TRAIN.format(x="batch").replace("\n    ", "\n") + "\nfor x in batch:\n    if x > 0:\n        step += 1", True,
    ),
    "what is beside the steps": (
        "for x in batch:\n    " + TRAIN.format(x="x") + "\n    for y in x:\n        if y > 0:\n            step += 1",
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "of_share"), COUNTED.values(), ids=COUNTED.keys())
def test_steps_are_no_items(body: str, of_share: bool) -> None:
    text = SCRIPT.format(body="".join(f"    {line}\n" for line in body.splitlines()))
    found = convert_text("step = 0\n" + text + "    if step % 10 == 0:\n        print(step)\n", Options()).reported
    assert any(said.message.startswith("step may be of this rank's share") for said in found) is of_share
