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


BESIDE = {
    "behind": "for x, i in zip(batches, range(9)):",
    "in front": "for i, x in zip(range(9), batches):",
    "by numpy": "for x, i in zip(batches, np.arange(len(batches))):",
    "endless": "for x, i in zip(batches, itertools.count()):",
    "in a bar": "for x, i in tqdm(zip(batches, range(9))):",
    "by a name": "pairs = zip(batches, range(9))\n    for x, i in pairs:",
}
PAIRED = """import itertools

import numpy as np
import torch
from tqdm import tqdm

net = torch.nn.Linear(2, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def main(batches):
    {loop}
        loss = net(x).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if {test}:
            print(loss.item())


main(list(torch.randn(9, 8, 2)))
"""


@pytest.mark.parametrize("loop", BESIDE.values(), ids=BESIDE.keys())
def test_a_number_that_is_paired_with_batches_is_none_of_them(loop: str) -> None:
    result = convert_text(PAIRED.format(loop=loop, test="i % int(9 / 5 + 1) == 0"))
    assert not result.error and b"optim_manager.backward(" in result.after
    assert not any("this test is of the batch" in item.message for item in result.reported)


def test_what_is_paired_with_a_number_is_a_batch() -> None:
    result = convert_text(PAIRED.format(loop=BESIDE["behind"], test="x[0, 0] > 0"))
    assert any("this test is of the batch" in item.message for item in result.reported)
