# ruff: noqa: E501 - tables of code are easier to read on one line
"""Functions that draw a batch and ask for its size again: a rank's share of what is drawn would have fewer."""

from __future__ import annotations

from textwrap import indent

import pytest

from rewriter.convert import convert_text

SCRIPT = """import numpy as np
import torch

net = torch.nn.Linear(8, 8)
data = torch.randn(1000)
off = torch.arange(8)


def get_batch(data, batch_size, n=8):
{drawn}


optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(4):
    x = get_batch(data, 4)
    loss = (net(x) - x).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
DRAW = "ix = torch.randint(len(data) - n, (batch_size,))\n"
AT = DRAW + "at = ix.unsqueeze(-1) + off.unsqueeze(0)\n"
STACK = DRAW + "x = torch.stack([data[i : i + n] for i in ix])\n"
LAID = {
    "view": (
        AT + "return data[at.flatten()].view(batch_size, n)",
        "return bmt.shard_batch(data[at.flatten()].view(batch_size, n))",
    ),
    "and cast": (
        AT + "x = torch.take_along_dim(data, at.flatten(), dim=0).view(batch_size, n).float()\nreturn x",
        "x = bmt.shard_batch(torch.take_along_dim(data, at.flatten(), dim=0).view(batch_size, n).float())",
    ),
    "a function": (
        AT + "x = data[at.reshape(-1)]\nx = torch.reshape(x, (batch_size, n))\nreturn x",
        "x = bmt.shard_batch(torch.reshape(x, (batch_size, n)))",
    ),
    "unflatten": (
        AT + "return data[at.flatten()].unflatten(0, (batch_size, n))",
        "bmt.shard_batch(data[at.flatten()].unflatten(0, (batch_size, n)))",
    ),
    "twice": (
        AT + "x = data[at.flatten()].view(batch_size, n)\nx = x.view(batch_size, 2, 4)\nreturn x[:, 0]",
        "x = bmt.shard_batch(x.view(batch_size, 2, 4))",
    ),
    "two": (
        AT + "x = data[at.flatten()].view(batch_size, n)\ny = data[at.flatten() + 1].view(batch_size, n)\nreturn x - y",
        "y = bmt.shard_batch(data[at.flatten() + 1].view(batch_size, n))",
    ),
    "positions of numpy": (
        "ix = np.random.randint(0, len(data) - n, batch_size)\nx = data[torch.from_numpy((ix[:, None] + np.arange(n)).reshape(-1))]\nreturn x.view(batch_size, n)",
        "return bmt.shard_batch(x.view(batch_size, n))",
    ),
}
LEFT = {
    "filled": DRAW
    + "x = torch.empty(batch_size, n)\nfor i in range(batch_size):\n    x[i] = data[ix[i] : ix[i] + n]\nreturn x",
    "listed": DRAW
    + "x = []\nfor i in range(batch_size):\n    x.append(data[ix[i] : ix[i] + n])\nreturn torch.stack(x)",
    "one-hot": DRAW + "x = torch.zeros(batch_size, 1000)\nx[torch.arange(batch_size), ix] = 1\nreturn x[:, :n]",
    "beside": "a = torch.randn(batch_size, n - 2)\nreturn torch.cat([a, torch.zeros(batch_size, 2)], 1)",
    "expanded": STACK + "return x + off.expand(batch_size, -1)",
    "asserted": STACK + "assert x.shape == (batch_size, n)\nreturn x",
    "an order": "x = torch.randn(batch_size, n)\nreturn x[torch.randperm(batch_size)]",
    "time first": DRAW + "x = data[(ix + off[:, None]).flatten()].view(n, batch_size)\nreturn x.t()",
    "a slice": "x = torch.randn(batch_size, n)\ny = torch.randn(100, n)[:batch_size]\nreturn x + y",
    "another's": STACK + "return x + net.state(batch_size)",
    "laid out, and beside": AT + "x = data[at.flatten()].view(batch_size, n)\nreturn x + data[ix][:, None]",
    "laid out under a test": AT + "x = data[at.flatten()]\nif n > 3:\n    x = x.view(batch_size, n)\nreturn x",
}
SHARED = {
    "once": STACK + "return x",
    "said": STACK + "print('batch', batch_size)\nreturn x",
    "counted": STACK + "steps = range(len(data) // batch_size)\nreturn x / len(steps)",
    "two draws": "x = torch.randn(batch_size, n)\ny = torch.randn(batch_size, n)\nreturn x + y",
    "a mean": "x = torch.randn(batch_size, n)\nreturn x - int(batch_size) / batch_size",
}


def conversion(drawn: str) -> tuple[str, list[str]]:
    result = convert_text(SCRIPT.format(drawn=indent(drawn, "    ")))
    return result.after.decode(), [said.message for said in result.reported]


@pytest.mark.parametrize(("drawn", "shared"), LAID.values(), ids=LAID.keys())
def test_a_batch_that_is_laid_out_by_its_size_is_shared_there(drawn: str, shared: str) -> None:
    after, said = conversion(drawn)
    assert shared in after and after.count("shard_batch(") == (2 if "y = " in shared else 1) and not said


@pytest.mark.parametrize("drawn", LEFT.values(), ids=LEFT.keys())
def test_a_batch_that_more_is_made_for_stays_whole_and_is_told(drawn: str) -> None:
    after, said = conversion(drawn)
    assert "shard_batch(" not in after and any("a share has fewer" in message for message in said)


@pytest.mark.parametrize("drawn", SHARED.values(), ids=SHARED.keys())
def test_what_is_drawn_alone_is_shared(drawn: str) -> None:
    after, said = conversion(drawn)
    assert "bmt.shard_batch(torch." in after and not any("a share has fewer" in message for message in said)
