# ruff: noqa: E501 - tables of code are easier to read on one line
"""Scripts that start their own processes are started by torchrun, and train as one process does."""

from __future__ import annotations

import os
from typing import Any

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted

HEAD = """import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP
"""
WORKER = """

def worker(rank, n, lr=0.1):
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = "1"
    dist.init_process_group("gloo", rank=rank, world_size=n)
    torch.manual_seed(3)
    net = DDP(torch.nn.Linear(4, 1))
    opt = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(3):
        loss = net(torch.full((2, 4), float(rank + step))).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        kept.append((rank, n, loss.item()))
    dist.destroy_process_group()


"""
RANK, COUNT = 'int(os.environ.get("LOCAL_RANK", 0))', 'int(os.environ.get("LOCAL_WORLD_SIZE", 1))'
STARTS = {
    "by place": ("mp.spawn(worker, (2,), 2)", f"worker({RANK}, {COUNT})"),
    "by name": ("mp.spawn(fn=worker, nprocs=n, args=(n, 0.2), join=True)", f"worker({RANK}, {COUNT}, 0.2)"),
    "no arguments": ("mp.spawn(worker, nprocs=4)", f"worker({RANK})"),
    "a number of GPUs": (
        "count = torch.cuda.device_count()\nmp.spawn(worker, nprocs=count, args=(count,))", f"count = {COUNT}\n",
    ),
    "an attribute": (
        "mp.spawn(worker, nprocs=args.gpus, args=(args,))", f"args.gpus = {COUNT}\nworker({RANK}, args)",
    ),
    "one or many": (
        "if n > 1:\n    mp.spawn(worker, nprocs=n, args=(n,))\nelse:\n    worker(0, 1)",
        f"    worker({RANK}, {COUNT})\nelse:\n    worker(0, 1)",
    ),
    "by attribute": (
        "if args.gpus > 1:\n    mp.spawn(worker, nprocs=args.gpus, args=(args.gpus,))\nelse:\n    worker(0, 1)",
        f"args.gpus = {COUNT}\nif args.gpus > 1:\n    worker({RANK}, {COUNT})\nelse:",
    ),
    "as found": (
        "if torch.cuda.device_count() > 1:\n    mp.spawn(worker, nprocs=torch.cuda.device_count())\nelse:\n    worker(0, 1)",
        f"if {COUNT} > 1:\n    worker({RANK})\nelse:",
    ),
    "under a test": (
        "h.n = 0\nif torch.cuda.is_available():\n    h.n = torch.cuda.device_count()\nif h.n > 1:\n    mp.spawn(worker, nprocs=h.n)\nelse:\n    worker(0, 1)",
        f"h.n = {COUNT}\nif h.n > 1:\n    worker({RANK})\nelse:",
    ),
    "the other way round": (
        "if args.gpus == 1:\n    worker(0, 1)\nelse:\n    mp.spawn(worker, nprocs=args.gpus)",
        f"args.gpus = {COUNT}\nif args.gpus == 1:\n    worker(0, 1)\nelse:\n    worker({RANK})",
    ),
    "by a list": (
        "if len(args.ids) > 1:\n    mp.spawn(worker, nprocs=len(args.ids))\nelse:\n    worker(0, 1)",
        f"if {COUNT} > 1:\n    worker({RANK})\nelse:",
    ),
    "and a flag": (
        "if n > 1 and args.ddp:\n    mp.spawn(worker, nprocs=n)\nelse:\n    worker(0, 1)",
        f"n = {COUNT}\nif n > 1 and args.ddp:",
    ),
    "at most": (
        "n = min(torch.cuda.device_count(), args.n)\nif n > 1:\n    mp.spawn(worker, nprocs=n)\nelse:\n    worker(rank=0, n=1)",
        f"n = {COUNT}\nif n > 1:",
    ),
    "leaves before": (
        "def main(args):\n    if args.gpus <= 1:\n        worker(0, 1)\n        return\n    mp.spawn(worker, nprocs=args.gpus)\n\n\nmain(args)",
        f"    args.gpus = {COUNT}\n    if args.gpus <= 1:\n        worker(0, 1)\n        return\n    worker({RANK})",
    ),
    "processes": (
        "ps = []\nfor i in range(n):\n    p = mp.Process(target=worker, args=(i, n))\n    p.start()\n    ps.append(p)\n"
        "for p in ps:\n    p.join()\nprint(1)",
        f"worker({RANK}, {COUNT})\nbmt.print_rank(1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("start", "wanted"), STARTS.values(), ids=STARTS.keys())
def test_torchrun_starts_the_processes(start: str, wanted: str) -> None:
    after = converted(HEAD + WORKER + start + "\n")
    assert wanted in after and "spawn(" not in after and "Process(" not in after
    assert 'os.environ.setdefault("MASTER_PORT", "1")' in after and "init_process_group" not in after


FLAGS = {
    "a flag": "if args.ddp:\n    mp.spawn(worker, nprocs=n, args=(n,))\nelse:\n    worker(0, 1)",
    "a flag and no number": "if args.ddp:\n    mp.spawn(worker, nprocs=n, args=(n,))\nelse:\n    worker(args.gpu, 1)",
    "not a flag": "if not args.ddp:\n    worker(None, 1)\nelse:\n    mp.spawn(worker, nprocs=n, args=(n,))",
}


@pytest.mark.parametrize("start", FLAGS.values(), ids=FLAGS.keys())
def test_a_flag_that_sends_all_ranks_elsewhere_is_reported(start: str) -> None:
    result = convert_text(HEAD + WORKER + start + "\n")
    assert any("take themselves for rank 0" in finding.message for finding in result.reported)


TOLD = {
    "its rank": 'rank = int(os.environ["RANK"])',
    "by get": 'rank = int(os.environ.get("RANK", 0))',
    "of this machine": 'rank = int(os.getenv("LOCAL_RANK", "0"))',
    "in settings": 'args.rank = int(os.environ["RANK"])',
}


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD.keys())
@pytest.mark.parametrize("more", ["", "\nif args.one:\n    {rank} = 0"])
def test_what_the_launcher_says_is_no_rank_0(told: str, more: str) -> None:
    rank = told.split(" ")[0]
    start = f"if args.ddp:\n    mp.spawn(worker, nprocs=n, args=(n,))\nelse:\n    worker({rank}, n)"
    result = convert_text(HEAD + "import os\n" + WORKER + told + more.format(rank=rank) + "\n" + start + "\n")
    assert any("take themselves for rank 0" in said.message for said in result.reported) == bool(more)


LEFT = {
    "a context": "started = mp.spawn(worker, nprocs=2, join=False)",
    "arguments that are not seen": "mp.spawn(worker, nprocs=2, args=given)",
    "one process": "p = mp.Process(target=worker, args=(0, 1))\np.start()",
    "a rank that is counted on": "for i in range(2):\n    p = mp.Process(target=worker, args=(i + 4, 2))\n    p.start()",
}


@pytest.mark.parametrize("start", LEFT.values(), ids=LEFT.keys())
def test_left(start: str) -> None:
    result = convert_text(HEAD + WORKER + start + "\n")
    assert not result.changed and [finding.code for finding in result.reported] == ["BMT040"]


def test_processes_that_load_data_stay() -> None:
    text = f"{HEAD}\n\ndef fill(queue):\n    queue.put(1)\n{WORKER}mp.Process(target=fill, args=(q,)).start()\nmp.spawn(worker, nprocs=2)\n"
    assert "mp.Process(target=fill, args=(q,)).start()" in converted(text)


def play(text: str) -> list[Any]:
    kept: list[Any] = []
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    exec(compile(text, "program.py", "exec"), {"kept": kept, "n": 2, "__name__": "__main__"})
    return kept


def plain() -> list[float]:
    """The losses of one process that has the batches of both ranks."""
    import torch

    torch.manual_seed(3)
    net = torch.nn.Linear(4, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        x = torch.cat([torch.full((2, 4), float(rank + step)) for rank in range(2)])
        loss = net(x).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def test_the_ranks_train_as_one_process() -> None:
    text = converted(HEAD + WORKER + "mp.spawn(worker, nprocs=n, args=(n,))\n")
    ranks = run_ranks(2, play, text, initialize=False, fresh=True, timeout=100)
    for number, kept in enumerate(ranks):
        assert [(rank, count) for rank, count, _ in kept] == [(number, 2)] * 3
        assert [loss for *_, loss in kept] == pytest.approx(plain(), rel=1e-5)


def test_processes_that_get_queues_work_for_one() -> None:
    pool = "def play(tasks, n):\n    net = torch.nn.Linear(4, 1)\n    tasks.put(net(torch.ones(4)))\n\n\ntasks = mp.Queue()\n"
    pool += "for i in range(2):\n    mp.Process(target=play, args=(tasks, i)).start()\n"
    train = "net = torch.nn.Linear(4, 1)\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\nnet(tasks.get()).mean().backward()\nopt.step()\n"
    result = convert_text(f"import torch\nimport torch.multiprocessing as mp\n\n\n{pool}{train}")
    assert "mp.Process(target=play, args=(tasks, i)).start()" in result.after.decode()
    assert any("work for it by queues" in finding.message and finding.differs for finding in result.reported)
