"""Names that rank 0 alone gives values to, in a guard with an else branch, and that a guard reads which all enter."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

SCRIPT = """import argparse
import os
from glob import glob
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("nccl")
rank = dist.get_rank()
{guard}
net = DDP(torch.nn.Linear(4, 4))
opt = torch.optim.AdamW(net.parameters())
for step in range(4):
    net(torch.ones(2, 4)).mean().backward()
    opt.step()
    opt.zero_grad()
    if rank == 0:
        checkpoint = {{"model": net.module.state_dict(), "opt": opt.state_dict()}}
        path = {path}
        torch.save(checkpoint, path)
    dist.barrier()
"""
GUARD = """if rank == 0:
    os.makedirs("results", exist_ok=True)
    index = len(glob("results/*"))
    folder = {value}
    os.makedirs(folder, exist_ok=True)
    log = open(f"{{folder}}/log.txt", "w")
else:
    log = None
"""
TOLD = "folder = bmt.store.broadcast_object(folder if bmt.rank() == 0 else None)\n"
VALUES = {
    "text": 'f"results/{index:03d}"',
    "joined": 'os.path.join("results", str(index))',
    "a path": 'Path("results") / str(index)',
    "added up": '"results/" + str(index)',
    "a time": 'time.strftime("%H")',
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_all_ranks_are_told_it_behind_the_guard(value: str) -> None:
    after = converted(SCRIPT.format(guard=GUARD.format(value=value), path='f"{folder}/{step}.pt"'))
    assert f"else:\n    log = None\n{TOLD}" in after
    assert "bmt.save_checkpoint(checkpoint, path)" in after
    assert "index = bmt" not in after


def test_what_no_other_rank_reads_is_not_told() -> None:
    after = converted(SCRIPT.format(guard=GUARD.format(value='f"r/{index}"'), path='f"{step}.pt"'))
    assert "broadcast_object" not in after


def test_what_the_others_have_too_is_not_told() -> None:
    guard = GUARD.format(value='f"r/{index}"').replace("    log = None", '    log, folder = None, "r"')
    assert "broadcast_object" not in converted(SCRIPT.format(guard=guard, path='f"{folder}/{step}.pt"'))


def test_a_guard_with_one_side_is_entered_by_all() -> None:
    guard = 'if rank == 0:\n    folder = "results/1"\n'
    after = converted(SCRIPT.format(guard=guard, path='f"{folder}/{step}.pt"'))
    assert "broadcast_object" not in after and '\nfolder = "results/1"\n' in after


NOT_TOLD = {
    "an object": (GUARD.format(value="make_folder(index)"), "folder"),
    "by more than the rank": (GUARD.format(value='f"r/{index}"').replace("rank == 0", "rank == 0 and save"), "folder"),
}


@pytest.mark.parametrize(("guard", "name"), NOT_TOLD.values(), ids=NOT_TOLD.keys())
def test_what_cannot_be_told_is_said(guard: str, name: str) -> None:
    result = convert_text(SCRIPT.format(guard=guard, path='f"{folder}/{step}.pt"'))
    assert b"broadcast_object" not in result.after
    assert any(said.message.startswith(f"{name} has a value on one rank only") for said in result.reported)
