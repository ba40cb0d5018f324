"""Files that have a rank's number in their names: each rank writes its own, but for states, which are shards."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

args = argparse.ArgumentParser().parse_args()
dist.init_process_group("nccl")
args.rank = dist.get_rank()
rank = dist.get_rank()
{path}
net = DDP(torch.nn.Linear(4, 4))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
queue = torch.zeros(4, 4)
for step in range(4):
    out = net(torch.ones(2, 4))
    out.mean().backward()
    opt.step()
    opt.zero_grad()
    queue[:2] = out.detach()
{save}
"""
OWN = {
    "by a name": (
        'path = os.path.join("out", "queue" + str(args.rank) + ".pth")',
        'torch.save({"queue": queue}, path)',
    ),
    "there": ("", 'torch.save(queue, f"queue{rank}.pt")'),
    "asked": ("", 'torch.save(queue, f"queue{dist.get_rank()}.pt")'),
    "joined": ('folder = f"out/{rank}"\npath = os.path.join(folder, "queue.pt")', "torch.save(queue, path)"),
}
SHARED = {
    "by a name": ('path = os.path.join("out", "queue.pth")', 'torch.save({"queue": queue}, path)'),
    "by a step": ("", 'torch.save(queue, f"queue{step}.pt")'),
}
STATES = {
    "a model's": ("", 'torch.save(net.module.state_dict(), f"net{rank}.pt")'),
    "in a dict": ("", 'torch.save({"opt": opt.state_dict(), "queue": queue}, f"net{rank}.pt")'),
    "by a name": ("", 'state = {"net": net.state_dict()}\ntorch.save(state, f"net{rank}.pt")'),
}


def result(path: str, save: str) -> tuple[str, list[str]]:
    done = convert_text(SCRIPT.format(path=path, save=save))
    assert not done.error
    return done.after.decode(), [said.message for said in done.reported if said.code == "BMT026"]


@pytest.mark.parametrize(("path", "save"), OWN.values(), ids=OWN.keys())
def test_each_rank_writes_its_own(path: str, save: str) -> None:
    after, told = result(path, save)
    assert f"\n{save.replace('dist.get_rank()', 'bmt.rank()')}\n" in after and told == []


@pytest.mark.parametrize(("path", "save"), SHARED.values(), ids=SHARED.keys())
def test_one_rank_writes_what_all_have(path: str, save: str) -> None:
    after, told = result(path, save)
    assert "bmt.save_checkpoint(" in after and told == []


@pytest.mark.parametrize(("path", "save"), STATES.values(), ids=STATES.keys())
def test_states_are_one_file_and_that_is_said(path: str, save: str) -> None:
    after, told = result(path, save)
    assert "torch.save(" not in after and len(told) == 1
