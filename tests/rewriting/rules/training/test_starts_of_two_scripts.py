"""A function that a file runs itself, and that another script calls, which has started the ranks already."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

TRAIN = """import torch
import torch.distributed as dist


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x)


def main(args=None):
    dist.init_process_group("gloo")
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        net(torch.ones(2, 4)).mean().backward()
        opt.step()
        opt.zero_grad()


if __name__ == "__main__":
    main()
"""
LAUNCH = """import os

import torch.distributed as dist
import torch.multiprocessing as mp
{imports}


def process(rank, world_size):
    os.makedirs("out", exist_ok=True)
    with open("out/settings.txt", "w") as file:
        file.write(str(world_size))
    {call}


if __name__ == "__main__":
    mp.spawn(process, nprocs=2, args=(2,))
"""
CALLS = {
    "by its name": ("from train import main", "main(world_size)"),
    "by another name": ("from train import main as run", "run(world_size)"),
    "of its module": ("import train", "train.main(world_size)"),
    "returned": ("import train as t", "return t.main(world_size)"),
}
GUARDED = "    if not bmt.is_initialized():\n        bmt.init_distributed()\n"


def converted(folder: Path, files: dict[str, str]) -> dict[str, str]:
    for name, text in files.items():
        (folder / name).write_text(text)
    results = convert_paths([folder / name for name in files], Options(), [folder])
    assert not any(result.error for result in results)
    return {result.path.name: result.after.decode() for result in results}


@pytest.mark.parametrize(("imports", "call"), CALLS.values(), ids=CALLS.keys())
def test_it_starts_them_where_they_are_not_started(imports: str, call: str, tmp_path: Path) -> None:
    after = converted(tmp_path, {"train.py": TRAIN, "launch.py": LAUNCH.format(imports=imports, call=call)})
    assert GUARDED in after["train.py"]
    assert "    bmt.init_distributed()\n" in after["launch.py"] and GUARDED not in after["launch.py"]


def test_a_script_that_nobody_calls_starts_them(tmp_path: Path) -> None:
    after = converted(tmp_path, {"train.py": TRAIN})
    assert "is_initialized" not in after["train.py"] and "    bmt.init_distributed()\n" in after["train.py"]


def test_a_script_of_which_another_function_is_called_starts_them(tmp_path: Path) -> None:
    train = TRAIN.replace("def main(", "def helper():\n    return 1\n\n\ndef main(")
    launch = LAUNCH.format(imports="from train import helper", call="helper()")
    after = converted(tmp_path, {"train.py": train, "launch.py": launch})
    assert "is_initialized" not in after["train.py"]
