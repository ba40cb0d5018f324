# ruff: noqa: E501 - tables of code are easier to read on one line
"""Where the first rank goes first through what is for all ranks, no rank waits: barriers and collectives would meet."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.runtime.ranks import run_ranks

from ...helpers import converted, printed

HEAD = """import contextlib
import os
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
distributed = True


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.a(x)


def wait():
    dist.barrier()


@contextlib.contextmanager
def first(rank):
    if rank not in [-1, 0]:
        dist.barrier()
    yield
    if rank == 0:
        dist.barrier()


def load():
    if os.path.exists("rows.pt"):
        print("found")
        return torch.load("rows.pt")
    made = torch.ones(2, 4)
    torch.save(made, "rows.pt")
    return made


torch.manual_seed(1)
"""
TRAINS = """
net = DDP(net)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(2):
    loss = net(rows).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    if rank == 0:
        print(f"{loss.item():.5f}")
"""
CACHE = 'if os.path.exists("rows.pt"):\n    rows = torch.load("rows.pt")\nelse:\n    rows = torch.ones(2, 4)\n    torch.save(rows, "rows.pt")\n'
WAITS = {
    "the most copied": ("if rank not in [-1, 0]:\n    dist.barrier()\n", "if rank == 0:\n    dist.barrier()\n"),
    "unlike 0": ("if rank != 0:\n    dist.barrier()\n", "if rank == 0:\n    dist.barrier()\n"),
    "above 0": ("if rank > 0:\n    dist.barrier()\n", "if not rank:\n    dist.barrier()\n"),
    "and a flag": ("if distributed and rank != 0:\n    dist.barrier()\n", "if distributed and rank == 0:\n    dist.barrier()\n"),
    "a function": ("if rank > 0:\n    wait()\n", "if rank in (-1, 0):\n    wait()\n"),
}  # fmt: skip
AROUND = {
    "a file of all": f"{CACHE}net = Net()\n",
    "a function with a file of all": "rows = load()\nnet = Net()\n",
    "a model": "net = Net()\nrows = torch.ones(2, 4)\n",
    "a model that is run": "net = Net()\nnet(torch.ones(1, 4))\nrows = torch.ones(2, 4)\n",
}
ORDINARY = {
    "a file of one": 'rows = torch.ones(2, 4)\nif not os.path.exists("rows.txt") and rank == 0:\n    open("rows.txt", "w").write("1")\n',
    "a look": 'rows = torch.ones(2, 4)\nprint(os.listdir("."))\n',
}  # fmt: skip


@pytest.mark.parametrize("around", ORDINARY)
@pytest.mark.parametrize("name", WAITS)
def test_the_order_stays_around_what_no_other_rank_is_needed_for(name: str, around: str) -> None:
    before, behind = (text.replace("dist.barrier()", "bmt.synchronize()") for text in WAITS[name])
    after = converted(f"{HEAD}{WAITS[name][0]}{ORDINARY[around]}{WAITS[name][1]}net = Net()\n{TRAINS}")
    assert before in after and behind in after
    after = converted(f"{HEAD}with first(rank):\n{_indented(ORDINARY[around])}net = Net()\n{TRAINS}")
    assert "with first(rank):" in after


def test_other_tests_stay() -> None:
    text = f"{HEAD}net = Net()\nrows = torch.ones(2, 4)\nif rank == 0:\n    dist.barrier()\n{TRAINS}if rank != 0:\n    dist.barrier()\n"
    after = converted(text)
    assert "if rank == 0:\n    bmt.synchronize()\n" in after and "if rank != 0:\n    bmt.synchronize()\n" in after


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", [*WAITS, "a manager"])
def test_all_ranks_go_together(name: str, around: str, tmp_path: Path) -> None:
    if name == "a manager":
        text = f"{HEAD}with first(rank):\n{_indented(AROUND[around])}{TRAINS}"
    else:
        text = f"{HEAD}{WAITS[name][0]}{AROUND[around]}{WAITS[name][1]}{TRAINS}"
    after = converted(text)
    main = after[after.index("torch.manual_seed(1)") :]
    assert "synchronize()" not in main and "wait()" not in main and "with first" not in main
    if name in ("the most copied", "a manager"):
        (lines, _) = run_ranks(2, _play, after, str(tmp_path))
        assert lines == _losses()


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _play(text: str, folder: str) -> list[str]:
    os.chdir(folder)
    return printed(re.sub(r"bmt\.init_distributed\(.*\)", "torch.manual_seed(1)", text))


def _losses() -> list[str]:
    import torch

    torch.manual_seed(1)
    net = torch.nn.Linear(4, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    lines = []
    for _ in range(2):
        loss = net(torch.ones(2, 4)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        lines.append(f"{loss.item():.5f}")
    return lines
