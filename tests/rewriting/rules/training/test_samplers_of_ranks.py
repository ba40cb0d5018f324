"""Samplers that take a rank's part, in a file which names no process group: the loader's batches are shares already."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

TRAIN = """import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torch.utils.data.distributed import *
from ranks import get_rank, get_world_size, start
from net import Net


class Part(Sampler):
    def __init__(self, data, {given}):
        self.data = data
        {body}

    def __iter__(self):
        return iter(range(len(self.data)))


def main(args):
    start()
    rank, size = get_rank(), get_world_size()
    data = torch.randn(8, 4)
    sampler = {sampler}
    loader = DataLoader(data, batch_size=4, {how})
    model = Net()
    for x in loader:
        loss = model(x).mean()
        loss.backward()
        model.opt.step()
        model.opt.zero_grad()


if __name__ == "__main__":
    main(None)
"""
RANKS = """import torch.distributed as dist


def start():
    dist.init_process_group("gloo")


def get_rank():
    return dist.get_rank()


def get_world_size():
    return dist.get_world_size()
"""
NET = """import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.opt = torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, x):
        return self.a(x)
"""
TOLD = {
    "positional": ("num_replicas, rank", "pass", "Part(data, size, rank)", "sampler=sampler"),
    "by name": ("world_size=1, rank=0", "pass", "Part(data, rank=rank, world_size=size)", "sampler=sampler"),
    "asks": ("seed=0", "self.rank = get_rank()", "Part(data)", "sampler=sampler"),
    "in batches": ("rank", "pass", "Part(data, rank)", "batch_sampler=torch.utils.data.BatchSampler(sampler, 4, True)"),
    "one of two": ("rank", "pass", "Part(data, rank) if size > 1 else RandomSampler(data)", "sampler=sampler"),
    "at once": ("rank", "pass", "None", "sampler=Part(data, rank)"),
}
OTHERS = {
    "random": ("seed=0", "pass", "RandomSampler(data)", "sampler=sampler"),
    "its own": ("seed=0", "self.seed = seed", "Part(data, 3)", "sampler=sampler"),
    "none": ("seed=0", "pass", "None", "sampler=None"),
}


def _train(folder: Path, case: tuple[str, str, str, str], ranks: str = RANKS) -> str:
    given, body, sampler, how = case
    texts = {"ranks.py": ranks, "net.py": NET}
    texts["train.py"] = TRAIN.format(given=given, body=body, sampler=sampler, how=how)
    for name, text in texts.items():
        (folder / name).write_text(text)
    results = convert_paths([folder / name for name in texts], Options(), [folder])
    assert not any(result.error for result in results), [result.error for result in results]
    return next(result.after.decode() for result in results if Path(result.path).name == "train.py")


@pytest.mark.parametrize("case", TOLD.values(), ids=TOLD.keys())
def test_a_share_is_not_cut_again(tmp_path: Path, case: tuple[str, str, str, str]) -> None:
    assert "shard_loader" not in _train(tmp_path, case)


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_one_that_knows_no_ranks_gives_whole_batches(tmp_path: Path, case: tuple[str, str, str, str]) -> None:
    assert "bmt.shard_loader(DataLoader" in _train(tmp_path, case)


def test_a_program_without_ranks_has_whole_batches(tmp_path: Path) -> None:
    ranks = "def start():\n    pass\n\n\ndef get_rank():\n    return 0\n\n\ndef get_world_size():\n    return 1\n"
    assert "bmt.shard_loader(DataLoader" in _train(tmp_path, TOLD["by name"], ranks)
