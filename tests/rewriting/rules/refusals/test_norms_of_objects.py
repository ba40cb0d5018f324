"""``normalizer.norm(target)`` is what an object makes of each item; ``x.norm(2)`` is one number of all of them."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch.utils.data import DataLoader


def train(loader, net, opt, normalizer, order):
    for x, y in loader:
        out = net(x)
        {made}
        opt.zero_grad()
        loss.backward()
        opt.step()


net = torch.nn.Linear(4, 1)
train(DataLoader(data, batch_size=4), net, torch.optim.SGD(net.parameters(), lr=0.1), Normalizer(), 2)
"""
OF_EACH = [
    "target = normalizer.norm(y)\n        loss = (out - target).square().mean()",
    "loss = torch.nn.functional.mse_loss(out, normalizer.norm(y))",
    "target = net.norm(x)\n        loss = torch.nn.functional.mse_loss(out, target)",
    "loss = torch.norm(out - y, 2, dim=1).mean()",
    "loss = (out - y).norm(2, 1).mean()",
]
OF_ALL = [
    "loss = (out - y).norm()",
    "loss = (out - y).norm(2)",
    "loss = (out - y).norm(order)",
    "loss = torch.norm(out - y)",
    "loss = torch.norm(out - y, p=2)",
]


def told(made: str) -> bool:
    found = convert_text(SCRIPT.format(made=made)).reported
    return any("another function of a mean over the batch" in said.message for said in found)


@pytest.mark.parametrize("made", OF_EACH)
def test_nothing_is_said_of_what_each_item_becomes(made: str) -> None:
    assert not told(made)


@pytest.mark.parametrize("made", OF_ALL)
def test_a_norm_of_the_batch_is_said(made: str) -> None:
    assert told(made)
