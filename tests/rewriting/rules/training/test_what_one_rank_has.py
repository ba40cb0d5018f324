"""What a guard of one rank gives a name to, and code of all ranks reads, is given on every rank."""

from __future__ import annotations

import pytest

from ...helpers import converted

HEAD = """import os
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
net = DDP(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
{given}
for x in batches:
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    if rank == 0:
        {read}
"""
READ = {
    "a file to print to": ("log = open('log.txt', 'w')", "print(loss.item(), file=log)", "log = open("),
    "a time": ("start = time.time()", "took = loss.item() / (time.time() - start)", "start = time.time()"),
    "a time that is printed": ("start = time.time()", "print(loss.item(), start)", "start = time.time()"),
    "a best value": ("best = 1e9", "best = min(best, loss.item())", "best = 1e9"),
    "a count": ("count = 0", "count += loss.item()", "count = 0"),
    "what is saved": ("notes = {}", "torch.save([net.state_dict(), notes], 'x.pt')", "notes = {}"),
}
LEFT = {
    "a list that only one rank fills": ("history = []", "history.append(loss.item())"),
    "a file that only one rank writes": ("log = open('log.txt', 'w')", "log.write(str(loss.item()))"),
}


@pytest.mark.parametrize(("given", "read", "wanted"), READ.values(), ids=READ.keys())
def test_every_rank_gets_it(given: str, read: str, wanted: str) -> None:
    after = converted(HEAD.format(given=f"if rank == 0:\n    {given}", read=read))
    assert f"\n{wanted}" in after and "if rank == 0:" not in after


@pytest.mark.parametrize(("given", "read"), LEFT.values(), ids=LEFT.keys())
def test_what_one_rank_alone_reads_stays_its_own(given: str, read: str) -> None:
    after = converted(HEAD.format(given=f"if rank == 0:\n    {given}", read=read))
    assert f"if rank == 0:\n    {given}" in after


def test_what_others_have_anyway_stays_one_ranks() -> None:
    given = "best = 1e9\nif rank == 0:\n    best = read_best()"
    after = converted(HEAD.format(given=given, read="print(best, loss.item())"))
    assert "if rank == 0:\n    best = read_best()" in after


def test_what_a_guard_does_beside_stays_one_ranks() -> None:
    given = "if rank == 0:\n    os.makedirs('out')\n    log = open('out/log.txt', 'w')"
    after = converted(HEAD.format(given=given, read="print(loss.item(), file=log)"))
    assert "if bmt.rank() == 0:\n    os.makedirs('out')\nlog = open('out/log.txt' if bmt.rank() == 0" in after


def test_an_attribute_is_given_on_every_rank() -> None:
    source = """import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP


class Trainer:
    def __init__(self, net, rank):
        self.net, self.rank = net, rank
        if self.rank == 0:
            self.best = 1e9

    def report(self, loss):
        if self.rank == 0:
            if loss < self.best:
                torch.save(self.net.state_dict(), "x.pt")


dist.init_process_group("gloo")
net = DDP(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
trainer = Trainer(net, dist.get_rank())
for x in batches:
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    trainer.report(loss.item())
"""
    after = converted(source)
    assert "self.net, self.rank = net, rank\n        self.best = 1e9\n" in after


def test_what_is_given_in_a_guard_of_one_rank_and_for_one_rank_is_needed_too() -> None:
    given = "if rank == 0:\n    start = 2\nif rank == 0:\n    rate = 3 / start"
    after = converted(HEAD.format(given=given, read="print(rate, loss.item())"))
    assert "\nstart = 2\nrate = 3 / start\n" in after


def test_a_guard_that_leaves_stays() -> None:
    given = "for path in paths:\n    if rank == 0:\n        log = open(path, 'w')\n        break"
    after = converted(HEAD.format(given=given, read="print(loss.item(), file=log)"))
    assert "    if rank == 0:\n        log = open(path, 'w')\n        break" in after
