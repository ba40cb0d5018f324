"""A loop that counts, also through a bar: a test of its number is no test of a batch."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch.utils.data import DataLoader
from tqdm import tqdm, trange


def endless(loader):
    while True:
        for x, y in loader:
            yield x


def main(steps):
    batches = endless(DataLoader(data, 8))
    net = torch.nn.Linear(2, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    {loop}
"""
BODY = """for step in {over}:
    x = next(batches)
    net(x).mean().backward()
    opt.step()
    if step % 2 == 0:
        with torch.no_grad():
            print(net(fixed).sum())
"""
OVER = {
    "range": "{body}",
    "a bar of range": "bar = tqdm(range(steps))\n{body}",
    "a bar in with": "with trange(steps) as bar:\n{indented}",
    "a bar of a bar": "with tqdm(range(steps)) as bar:\n{indented}",
    "trange": "bar = trange(steps, desc='a')\n{body}",
}


@pytest.mark.parametrize("loop", OVER.values(), ids=OVER.keys())
def test_every_so_many_steps_all_ranks_do_the_same(loop: str) -> None:
    body = BODY.format(over="bar" if "bar" in loop else "range(steps)")
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    text = loop.format(body=body, indented=indented).replace("\n", "\n    ")
    result = convert_text(SCRIPT.format(loop=text))
    assert not result.error
    assert b"optim_manager.backward(" in result.after
    assert not any("this test is of the batch" in item.message for item in result.reported)
