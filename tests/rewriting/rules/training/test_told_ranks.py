# ruff: noqa: E501 - tables of code are easier to read on one line
"""What a script tells torch's process group, by names that no launcher knows, is what the launcher says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_script

HEAD = """import argparse
import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


"""
TRAIN = """def train(rank, world_size, shared):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    sampler = DistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=False)
    loader = DataLoader(data, batch_size=8 // world_size, sampler=sampler)
    model = DDP(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        for x, y in loader:
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(epoch, len(loader), world_size, f"{loss.item():.5f}")


"""
PARSED = 'parser = argparse.ArgumentParser()\nparser.add_argument("--rank", type=int, default=0)\nparser.add_argument("--world-size", type=int, default=1)\nargs = parser.parse_args()\n'
URL = 'init_method="tcp://127.0.0.1:2345"'
SPAWN = 'if __name__ == "__main__":\n    count = torch.cuda.device_count()\n    mp.spawn(worker, args=(count,), nprocs=count)\n'
SETUP = (
    f'def setup(rank, world_size):\n    dist.init_process_group("gloo", {URL}, rank=rank, world_size=world_size)\n\n\n'
)
SCRIPTS = {
    "options": f'{PARSED}dist.init_process_group("gloo", {URL}, world_size=args.world_size, rank=args.rank)\ntrain(args.rank, args.world_size, None)\n',
    "options in order": f'{PARSED}dist.init_process_group("gloo", "env://", None, args.world_size, args.rank)\ntrain(args.rank, args.world_size, None)\n',
    "options of a function": f'{PARSED}\ndef setup(options):\n    dist.init_process_group("gloo", {URL}, world_size=options.world_size, rank=options.rank)\n\n\nsetup(args)\ntrain(args.rank, args.world_size, None)\n',
    "options handed on": f"{SETUP}{PARSED}setup(args.rank, args.world_size)\ntrain(args.rank, args.world_size, None)\n",
    "counted": f'{PARSED}args.world_size = torch.cuda.device_count()\nargs.rank += 0\ndist.init_process_group("gloo", {URL}, world_size=args.world_size, rank=args.rank)\ntrain(args.rank, args.world_size, None)\n',
    "a table": f'config = {{"rank": 0, "world": 1}}\ndist.init_process_group("gloo", {URL}, world_size=config["world"], rank=config["rank"])\ntrain(config["rank"], config["world"], None)\n',
    "names": f'rank, world_size = 0, 1\ndist.init_process_group("gloo", {URL}, world_size=world_size, rank=rank)\ntrain(rank, world_size, None)\n',
    "another launcher": f'rank = int(os.environ.get("SLURM_PROCID", 0))\nsize = int(os.environ.get("SLURM_NTASKS", 1))\ndist.init_process_group("gloo", {URL}, world_size=size, rank=rank)\ntrain(rank, size, None)\n',
    "a worker": f'def worker(rank, size):\n    dist.init_process_group("gloo", {URL}, rank=rank, world_size=size)\n    train(rank, size, None)\n\n\n{SPAWN}',
    "a worker that sets up": f"{SETUP}def worker(rank, size):\n    setup(rank, size)\n    train(rank, size, None)\n\n\n{SPAWN}",
}
ON_A_GPU = {
    "a worker": f'def worker(gpu, size):\n    dist.init_process_group("gloo", {URL}, rank=gpu, world_size=size)\n    device = torch.device("cpu", gpu)\n    train(gpu, size, device)\n\n\n{SPAWN}',
    "a worker that sets up": f"{SETUP}def worker(rank, size):\n    setup(rank, size)\n    device = rank if torch.cuda.is_available() else None\n    train(rank, size, device)\n\n\n{SPAWN}",
}
ONE_HOST_EACH = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def printed(text: str, folder: Path, ranks: int, hosts: bool = False) -> list[list[str]]:
    path = folder / "train.py"
    path.write_text(text)
    done = run_script(path, ranks=ranks, folder=folder, env=ONE_HOST_EACH if hosts else None)
    assert all(rank.returncode == 0 for rank in done), done[0].stderr
    return [rank.stdout.splitlines() for rank in done]


@pytest.mark.parametrize("name", SCRIPTS)
def test_ranks_share_the_data_and_one_prints(name: str, tmp_path: Path) -> None:
    result = convert_text(HEAD + TRAIN + SCRIPTS[name])
    assert not result.error
    text = result.after.decode()
    assert convert_text(text).after == result.after
    (alone,) = printed(text, tmp_path, 1)
    assert len(alone) == 2
    for hosts in (False, True):
        two = printed(text, tmp_path, 2, hosts)
        assert two == [[line.replace(" 1 ", " 2 ", 1) for line in alone], []]


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_worker_keeps_the_number_of_its_gpu(name: str, tmp_path: Path) -> None:
    """On two machines each, which says the same lines, as it is the first there."""
    text = convert_text(HEAD + TRAIN + ON_A_GPU[name]).after.decode()
    assert convert_text(text).after.decode() == text
    (alone,) = printed(text, tmp_path, 1)
    two = printed(text, tmp_path, 2, hosts=True)
    assert two[0] == [line.replace(" 1 ", " 2 ", 1) for line in alone]


KNOWN = {
    "torchrun's": f'rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])\ndist.init_process_group("gloo", {URL}, world_size=size, rank=rank)\ntrain(rank, size, None)\n',
    "torchrun's, of options": f'{PARSED}args.rank = int(os.getenv("RANK", 0))\nargs.world_size = int(os.environ.get("WORLD_SIZE", 1))\ndist.init_process_group("gloo", {URL}, world_size=args.world_size, rank=args.rank)\ntrain(args.rank, args.world_size, None)\n',
    "nothing told": 'dist.init_process_group("gloo")\ntrain(dist.get_rank(), dist.get_world_size(), None)\n',
    "numbers": f'dist.init_process_group("gloo", {URL}, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))\ntrain(dist.get_rank(), dist.get_world_size(), None)\n',
    "not read": f'{PARSED}dist.init_process_group("gloo", {URL}, world_size=args.world_size, rank=args.rank)\ntrain(dist.get_rank(), dist.get_world_size(), None)\n',
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_the_launcher_has_said_stays(name: str, tmp_path: Path) -> None:
    train = TRAIN.replace("world_size", "size") if name == "not read" else TRAIN
    text = convert_text(
        HEAD
        + train.replace("(rank, ", "(number, ").replace("rank=rank", "rank=number").replace("if rank", "if number")
        + KNOWN[name]
    ).after.decode()
    assert "= bmt.rank()\n" not in text and "bmt.world_size()\n" not in text
