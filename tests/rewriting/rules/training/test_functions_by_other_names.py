"""A function that all ranks must call is known by any name: its guard goes, its test is agreed upon."""

from __future__ import annotations

import pytest

from ...helpers import converted

HEAD = """import functools
import os
import torch

rank = int(os.environ["RANK"])
net = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(data, batch_size=8)
"""
KEEP = """

def keep(path):
    torch.save(net.state_dict(), path)


"""
HOLDER = (
    "class Holder:\n    def __init__(self, fn):\n        self.fn = fn\n\n    def go(self):\n        self.fn('a')\n\n\n"
)
LOOP = """for x, y in loader:
    loss = torch.nn.functional.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
hits = 0
for x, y in tests:
    hits += (net(x).argmax(1) == y).sum().item()
"""
NAMES = {
    "by its own": ("", "", "keep('a')"),
    "a variable before": ("if resume:\n    keep = torch.load('a')\n    net.load_state_dict(keep)\n", "", "keep('a')"),
    "none before": ("keep = None\n", "", "keep('a')"),
    "a loop's variable": ("for keep in range(3):\n    pass\n", "", "keep('a')"),
    "an import that may fail": ("try:\n    from extra import keep\nexcept ImportError:\n    pass\n", "", "keep('a')"),
    "wrapped": ("", "keep = timed(keep)\n", "keep('a')"),
    "a lambda": ("", "store = lambda: keep('a')\n", "store()"),
    "a partial": ("", "store = functools.partial(keep, 'a')\n", "store()"),
    "one of two": ("", "store = keep if quick else print\n", "store('a')"),
    "in a table": ("", "hooks = {'best': keep}\n", "hooks['best']('a')"),
    "in a list": ("", "hooks = [keep]\n", "for hook in hooks:\n        hook('a')"),
    "appended": ("", "hooks = []\nhooks.append(keep)\n", "for hook in hooks:\n        hook('a')"),
    "an argument": ("def call(fn):\n    fn('a')\n\n\n", "", "call(keep)"),
    "an attribute": (HOLDER, "holder = Holder(keep)\n", "holder.fn('a')"),
    "an attribute inside": (HOLDER, "holder = Holder(keep)\n", "holder.go()"),
}


@pytest.mark.parametrize(("before", "behind", "call"), NAMES.values(), ids=NAMES.keys())
def test_what_it_saves_is_saved_by_all(before: str, behind: str, call: str) -> None:
    after = converted(f"{HEAD}{before}{KEEP}{behind}{LOOP}if hits > 3:\n    {call}\nif rank == 0:\n    {call}\n")
    assert "if bmt.agree(hits > 3):" in after
    assert "if rank == 0:" not in after and after.rstrip().endswith(call.replace("    " * 2, "    "))


OTHERS = {
    "another function": ("", "store = print\n", "store('a')"),
    "a partial of another": ("", "store = functools.partial(print, 'a')\n", "store()"),
    "a list of others": ("", "hooks = [print]\n", "for hook in hooks:\n        hook('a')"),
}


@pytest.mark.parametrize(("before", "behind", "call"), OTHERS.values(), ids=OTHERS.keys())
def test_what_saves_nothing_stays_one_ranks(before: str, behind: str, call: str) -> None:
    after = converted(f"{HEAD}{before}{KEEP}{behind}{LOOP}if hits > 3:\n    {call}\nif rank == 0:\n    {call}\n")
    assert "agree" not in after and "if rank == 0:" in after
