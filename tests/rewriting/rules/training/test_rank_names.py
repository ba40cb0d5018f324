# ruff: noqa: E501 - tables of code are easier to read on one line
"""A rank is a rank whatever it is called: what stands under a test of it is lifted as under ``if rank == 0:``."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_script

HEAD = """import argparse
import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def made():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    model = DDP(torch.nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, 8 // dist.get_world_size(), sampler=DistributedSampler(data, shuffle=False))


"""
EPOCHS = """    model, optimizer, loader = made()
    for epoch in range(2):
        for x, y in loader:
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        {test}
            print(epoch, f"{{loss.item():.5f}}")
            torch.save(model.module.state_dict(), "model.pt")


"""
JOIN = 'dist.init_process_group("gloo", init_method="env://", rank={0}, world_size={1})\n'
SPAWN = 'if __name__ == "__main__":\n    os.environ["MASTER_ADDR"] = "127.0.0.1"\n    os.environ["MASTER_PORT"] = "8888"\n    mp.spawn({0}, args=({1}), nprocs=1)\n'
PLAIN = 'dist.init_process_group("gloo")\n'
SCRIPTS = {
    "a worker's argument": "def work(gpu, size):\n    " + JOIN.format("gpu", "size") + EPOCHS.format(test="if gpu == 0:") + SPAWN.format("work", "1,"),
    "counted over nodes": "def work(gpu, args):\n    number = args.node * args.gpus + gpu\n    " + JOIN.format("number", "args.gpus") + EPOCHS.format(test="if gpu == 0:") + SPAWN.format("work", "argparse.Namespace(node=0, gpus=1),"),
    "told the process group": "def work(gpu, args):\n    number = args.node * args.gpus + gpu\n    " + JOIN.format("number", "args.gpus") + EPOCHS.format(test="if number == 0:") + SPAWN.format("work", "argparse.Namespace(node=0, gpus=1),"),
    "an attribute": "def work(gpu, args):\n    args.gpu = gpu\n    " + JOIN.format("gpu", "1") + EPOCHS.format(test="if args.gpu == 0:") + SPAWN.format("work", "argparse.Namespace(gpu=None),"),
    "not the first": "def work(gpu, size):\n    " + JOIN.format("gpu", "size") + EPOCHS.format(test="if not gpu:") + SPAWN.format("work", "1,"),
    "handed on": "def work(gpu, size):\n    " + JOIN.format("gpu", "size") + "    train(gpu)\n\n\ndef train(me):\n" + EPOCHS.format(test="if me == 0:") + SPAWN.format("work", "1,"),
    "handed on by name": "def work(gpu, size):\n    " + JOIN.format("gpu", "size") + "    train(me=gpu)\n\n\ndef train(me=None):\n" + EPOCHS.format(test="if me in (0, None):") + SPAWN.format("work", "1,"),
    "of the environment": PLAIN + 'device_id = int(os.environ["LOCAL_RANK"])\nif True:\n' + EPOCHS.format(test="if device_id == 0:"),
    "started by a loop": "def work(who, size):\n    " + JOIN.format("who", "size") + EPOCHS.format(test="if who == 0:") + 'if __name__ == "__main__":\n    processes = []\n    for i in range(1):\n        p = mp.Process(target=work, args=(i, 1))\n        p.start()\n        processes.append(p)\n    for p in processes:\n        p.join()\n',
    "of another launcher": PLAIN + 'number = int(os.environ.get("SLURM_PROCID", 0))\nif True:\n' + EPOCHS.format(test="if number == 0:"),
    "the current device": PLAIN + "if True:\n" + EPOCHS.format(test="if torch.cuda.current_device() == 0:"),
    "an object's": PLAIN + 'class Trainer:\n    def __init__(self, gpu_id):\n        self.gpu_id = gpu_id\n        self.model, self.optimizer, self.loader = made()\n\n    def run(self):\n        for epoch in range(2):\n            for x, y in self.loader:\n                loss = (self.model(x) - y).square().mean()\n                self.optimizer.zero_grad()\n                loss.backward()\n                self.optimizer.step()\n            if self.gpu_id == 0 and epoch % 1 == 0:\n                print(epoch, f"{loss.item():.5f}")\n                torch.save(self.model.module.state_dict(), "model.pt")\n\n\nTrainer(int(os.environ["LOCAL_RANK"])).run()\n',
}  # fmt: skip


def run_alike(texts: dict[str, str], program: str, folder: Path) -> None:
    """Convert a project, which a second conversion leaves as it is: one rank of two prints what one process does."""
    for _ in range(2):
        for file, text in texts.items():
            (folder / file).write_text(text)
        results = convert_paths([folder / file for file in texts], Options(), [folder])
        before, texts = texts, {result.path.name: result.after.decode() for result in results}
    assert before == texts
    printed = []
    for ranks in (1, 2):
        done = run_script(folder / program, ranks=ranks, folder=folder)
        assert all(rank.returncode == 0 for rank in done), done[0].stderr
        printed.append([rank.stdout for rank in done])
        assert (folder / "model.pt").exists()
        (folder / "model.pt").unlink()
    assert printed == [[printed[0][0]], [printed[0][0], ""]] and printed[0][0].count("\n") == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_rank_prints_what_all_compute(name: str, tmp_path: Path) -> None:
    run_alike({"train.py": HEAD + SCRIPTS[name]}, "train.py", tmp_path)


OTHERS = {
    "counted again": "for gpu in range(2):\n    pass\n",
    "another value": "gpu = torch.cuda.device_count()\n",
    "added to": "gpu = 0\ngpu += 1\n",
    "another function's": "def work(gpu):\n    pass\n\n\nmp.spawn(work, nprocs=1)\ngpu = options.gpu\n",
    "an option": "gpu = options.gpu\n",
    "a sample's": "gpu = 3 * dist.get_world_size() + dist.get_rank()\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_rank_decides_for_all(name: str) -> None:
    tail = "model, optimizer, loader = made()\nfor x, y in loader:\n    loss = model(x).mean()\n    loss.backward()\n    optimizer.step()\nif gpu == 0:\n    torch.save(model.state_dict(), 'model.pt')\n"
    after = convert_text(HEAD + OTHERS[name] + tail).after.decode()
    assert "gpu == 0" in after


WORKER = """import torch
import torch.distributed as dist
from common import made, setup


def work(gpu, size):
    setup(gpu, size)
    train(gpu)


def train(me):
""" + EPOCHS.format(test="if me == 0:")
COMMON = HEAD + "def setup(number, size):\n    " + JOIN.format("number", "size")
STARTS = {
    "spawn": "import os\nimport torch.multiprocessing as mp\nimport worker\n\n" + SPAWN.format("worker.work", "1,"),
    "by name": "import os\nimport torch.multiprocessing as mp\nfrom worker import work\n\n" + SPAWN.format("work", "1,"),
    "a loop": "import torch.multiprocessing as mp\nfrom worker import work\n\nif __name__ == '__main__':\n    started = []\n    for i in range(1):\n        p = mp.Process(target=work, args=(i, 1))\n        p.start()\n        started.append(p)\n    for p in started:\n        p.join()\n",
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_workers_in_other_files(name: str, tmp_path: Path) -> None:
    run_alike({"common.py": COMMON, "worker.py": WORKER, "main.py": STARTS[name]}, "main.py", tmp_path)


GIVEN = "import os\nimport torch.distributed as dist\n\n\ndef start(args):\n    args.gpu = int(os.environ['LOCAL_RANK'])\n    {more}\n    dist.init_process_group('gloo')\n"
READ = (
    HEAD
    + "import given\n\n\ndef run(options):\n    given.start(options)\n"
    + EPOCHS
    + "run(argparse.Namespace(gpu=None))\n"
)
HELD = READ.replace(
    "def run(options):\n    given.start(options)\n",
    "class Job:\n  def run(self, options):\n    self.options = options\n    given.start(options)\n",
).replace("run(argparse", "Job().run(argparse")


@pytest.mark.parametrize(
    "test", ["options.gpu == 0", "not options.gpu", "options.gpu in (0, None)", "self.options.gpu == 0"]
)
def test_attributes_that_another_file_gives_a_rank(test: str, tmp_path: Path) -> None:
    main = (HELD if "self" in test else READ).format(test=f"if {test}:")
    run_alike({"given.py": GIVEN.format(more="pass"), "main.py": main}, "main.py", tmp_path)


def test_attributes_that_somebody_gives_another_number(tmp_path: Path) -> None:
    texts = {
        "given.py": GIVEN.format(more="args.gpu = args.gpus[0]"),
        "main.py": READ.format(test="if options.gpu == 0:"),
    }
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    results = convert_paths([tmp_path / file for file in texts], Options(), [tmp_path])
    assert b"if options.gpu == 0:" in results[1].after
