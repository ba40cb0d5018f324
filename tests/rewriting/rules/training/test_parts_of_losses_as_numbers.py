"""``float(x)`` of what a batch gives is this rank's, as ``x.item()`` is: it is reported, wherever it goes."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

writer = SummaryWriter("runs")
net = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for step, (x, y) in enumerate(DataLoader(data, batch_size=8)):
    out = net(x)
    loss, parts = losses(out, y)
    opt.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    rate = rate_at(step)
    {body}
"""
OF_SHARE = {
    "shown": 'writer.add_scalar("a", float(parts[0]), step)',
    "in a list": 'rows = [("a", float(parts[0])), ("b", float(parts[1]))]',
    "handed on": 'log([("a", float(parts[0]))], step)',
    "in a dict": 'note({"a": float(parts["a"])})',
    "detached": "note(float(parts[0].detach().cpu()))",
    "whole": "note(int(parts))",
    "by index": "note(float(out[-1]))",
}
OF_ALL = {
    "a loss": "note(float(loss))",
    "a loss that is shown": 'writer.add_scalar("a", float(loss), step)',
    "a norm": "note(float(norm))",
    "a number of steps": "note(float(step))",
    "a rate": "note(float(rate))",
    "settings": "note(float(args.rate), int(settings[0]))",
    "a text": 'note(float("inf"))',
}


def reported(body: str) -> bool:
    found = convert_text(SCRIPT.format(body=body)).reported
    return any("this rank's share" in said.message for said in found)


@pytest.mark.parametrize("body", OF_SHARE.values(), ids=OF_SHARE.keys())
def test_a_number_of_this_rank(body: str) -> None:
    assert reported(body)


@pytest.mark.parametrize("body", OF_ALL.values(), ids=OF_ALL.keys())
def test_a_number_of_all(body: str) -> None:
    assert not reported(body)
