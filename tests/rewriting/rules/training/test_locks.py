"""Locks on files around what is for all ranks: one rank would hold it, and wait for those that wait for the lock."""

from __future__ import annotations

from textwrap import indent

import pytest

from ...helpers import converted

HEAD = """import os
import torch
from contextlib import contextmanager
from filelock import FileLock
from torch.utils.data import DataLoader, TensorDataset


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x)


{before}net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
lock = FileLock("other.lock")
for (x,) in DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4):
    {start}loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
CACHE = """    if os.path.exists("rows.pt"):
        rows = torch.load("rows.pt")
    else:
        rows = torch.ones(2, 4)
        torch.save(rows, "rows.pt")
"""
HELD = """@contextmanager
def alone(path):
    lock = FileLock(path)
    with lock:
        yield 1


"""
OPENED = {
    "around a cache": (f'with FileLock("rows.lock"):\n{CACHE}', ""),
    "by a name": (f'own = FileLock("rows.lock")\nwith own:\n{CACHE}', ""),
    "in a function": ("def rows():\n" + indent(f'with FileLock("rows.lock"):\n{CACHE}', "    ") + "\n\nrows()\n", ""),
    "around a step": ("", "with FileLock('x.lock'):\n        net(x)\n    "),
    "in a manager": (HELD, "with alone('x.lock'):\n        net(x)\n    "),
}
KEPT = {
    "what one does": ('with FileLock("rows.lock"):\n    os.makedirs("rows", exist_ok=True)\n', ""),
    "in a manager": (HELD, "with alone('x.lock'):\n        print(x.shape)\n    "),
}


@pytest.mark.parametrize("name", KEPT)
def test_others_stay(name: str) -> None:
    before, start = KEPT[name]
    after = converted(HEAD.format(before=before, start=start))
    assert "with lock:" in after or "with FileLock(" in after


@pytest.mark.parametrize("name", OPENED)
def test_no_rank_holds_it(name: str) -> None:
    before, start = OPENED[name]
    after = converted(HEAD.format(before=before, start=start))
    assert "with lock:" not in after and "with own:" not in after and "with FileLock(" not in after
