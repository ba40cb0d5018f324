"""Checkpoints side by side: bmtrain's Checkpointer, and torch's DCP under FSDP2, of the same model with AdamW.

    python examples/benchmark/checkpoint.py                          # GPUs with nccl where there are any, else gloo
    python examples/benchmark/checkpoint.py 1.3b --ranks 2 --rounds 5 --folder /mnt/shared

Each engine trains in processes of its own, in turn, `rounds` times; the table has medians over rounds, and of ranks
the worst. Columns: what a rank's part is; for a save that waits, its seconds and the memory at its peak beyond what the
rank held before it; for one in the background, the seconds in the call, the seconds by which the steps that ran
meanwhile were slower, when it was on disk, and the memory at the peak beyond that of training alone. Memory is the
host's and, on GPUs, also the device's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model import SIZES, Config, Decoder

MIB = 2**20
SIZES["134m"] = Config(12, 768, 12, 2048)
LEARNING_RATE = 1e-4


def device_type() -> str:
    """The one place that asks."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Job:
    """What is measured of an engine, on each rank."""

    step: Callable[[Tensor, Tensor], None]
    save: Callable[[int], None]
    begin: Callable[[int], None]  # in the background
    done: Callable[[int], bool]  # whether what was begun is on disk
    end: Callable[[], None]  # take leave of what was begun
    agree: Callable[[bool], bool]  # rank 0's answer on all ranks
    part: int  # bytes of this rank


def bmtrain(size: str, folder: Path) -> Job:
    import bmtrain as bmt

    bmt.init_distributed(seed=0)
    model = bmt.BMTrainModelWrapper(Decoder(SIZES[size]))
    model.apply(model._init_weights)
    for block in model.blocks:
        bmt.Block(block, use_checkpoint=False)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    checkpointer = bmt.checkpoint.Checkpointer(folder, model=model, optimizer=optimizer, keep=1)

    def step(tokens: Tensor, targets: Tensor) -> None:
        manager.backward(model(tokens, targets))
        manager.step()
        manager.zero_grad()

    return Job(
        step,
        checkpointer.save,
        lambda number: checkpointer.save(number, wait=False),
        lambda number: (folder / f"step-{number:010d}").exists(),
        lambda: checkpointer.latest() and None,
        bmt.agree,
        sum(p.numel() for p in model.parameters()) * 12 // bmt.world_size(),
    )


def dcp(size: str, folder: Path) -> Job:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    kind = device_type()
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    beside, ours = (dist.new_group(backend="gloo") for _ in range(2))  # DCP's thread has one to itself
    torch.manual_seed(0)
    mesh = dist.init_device_mesh(kind, (dist.get_world_size(),))
    with device:
        model = Decoder(SIZES[size])
    model.apply(model._init_weights)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    begun = []

    def step(tokens: Tensor, targets: Tensor) -> None:
        model(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict:
        weights, states = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": states}

    def path(number: int) -> Path:
        return folder / f"step-{number:010d}"

    def forget(number: int) -> None:  # keeps one, as the other engine does
        dist.barrier(ours)
        if dist.get_rank() == 0:
            shutil.rmtree(path(number - 1), ignore_errors=True)

    def save(number: int) -> None:
        dcp.save(state(), checkpoint_id=path(number), process_group=beside)
        forget(number)

    def begin(number: int) -> None:
        begun.append((number, dcp.async_save(state(), checkpoint_id=path(number), process_group=beside)))

    def end() -> None:
        number, response = begun.pop()
        response.result()
        forget(number)

    def agree(mine: bool) -> bool:
        said = torch.tensor(int(mine))
        dist.broadcast(said, 0, group=ours)
        return bool(said)

    part = sum(p.numel() for p in model.parameters()) * 12 // dist.get_world_size()
    return Job(step, save, begin, lambda number: (path(number) / ".metadata").exists(), end, agree, part)


ENGINES = {"bmtrain": bmtrain, "FSDP2 and DCP": dcp}


def synchronize() -> None:
    if device_type() == "cuda":
        torch.cuda.synchronize()


class Peak:
    """The most bytes since it was made: of this process on the host, and of torch on its device."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        if device_type() == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def now(self) -> tuple[int, int]:
        return _status("VmHWM"), torch.cuda.max_memory_allocated() if device_type() == "cuda" else 0


def _status(name: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) * 1024


def worker(options: Namespace) -> None:
    job = ENGINES[options.engine](options.size, Path(options.folder))
    config = SIZES[options.size]
    torch.manual_seed(int(os.environ["RANK"]))
    tokens = torch.randint(config.vocab, (options.batch, options.sequence), device=device_type())
    number = 0

    def step() -> float:
        begun = time.perf_counter()
        job.step(tokens, tokens)
        synchronize()
        return time.perf_counter() - begun

    def timed(call: Callable[[], None]) -> float:
        job.agree(True)  # all ranks begin together
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    for _ in range(3):
        step()
    peak = Peak()
    before = peak.now()  # what is held between two steps
    waits = []
    for number in range(1, 3):
        waits.append(timed(partial(job.save, number)))
    waiting = peak.now()
    peak = Peak()
    usual = statistics.median(step() for _ in range(options.steps))
    training = peak.now()
    calls, slower, ready = [], [], []
    peak = Peak()
    for number in range(3, 3 + options.saves):
        begun = time.perf_counter()
        calls.append(timed(partial(job.begin, number)))
        took = []
        while not job.agree(job.done(number)):
            took.append(step())
        ready.append(time.perf_counter() - begun)
        slower.append(sum(took) - usual * len(took))
        job.end()
        if number == 3:
            meanwhile = peak.now()
    found = {
        "part": job.part, "step": usual, "save": statistics.median(waits),
        "save peak": [now - held for now, held in zip(waiting, before, strict=True)],
        "call": statistics.median(calls), "slower": statistics.median(slower), "ready": statistics.median(ready),
        "peak": [now - usually for now, usually in zip(meanwhile, training, strict=True)],
    }  # fmt: skip
    Path(options.report, os.environ["RANK"]).write_text(json.dumps(found))


def measured(engine: str, options: Namespace) -> dict:
    """Of one run, of ranks the worst."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, tempfile.TemporaryDirectory() as report:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}",
            __file__, options.size, "--engine", engine, "--folder", folder, "--report", report,
            "--steps", str(options.steps), "--saves", str(options.saves), "--batch", str(options.batch),
            "--sequence", str(options.sequence),
        ]  # fmt: skip
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        # Else malloc keeps what was freed, and a peak says how much of that a copy has found.
        honest = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024), "MALLOC_TRIM_THRESHOLD_": str(256 * 1024)}
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **honest, **env})
        ranks = [json.loads(path.read_text()) for path in Path(report).iterdir()]
    worst = {name: max(rank[name] for rank in ranks) for name in ranks[0] if "peak" not in name}
    peaks = ("save peak", "peak")
    return worst | {n: [max(of_ranks) for of_ranks in zip(*(rank[n] for rank in ranks), strict=True)] for n in peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="134m", choices=SIZES)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed without a save")
    parser.add_argument("--saves", type=int, default=3, help="saves in the background a round")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--folder", default=None, help="where checkpoints are written")
    parser.add_argument("--engine", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        worker(options)
        return
    rounds = {engine: [] for engine in ENGINES}
    for _ in range(options.rounds):
        for engine, found in rounds.items():
            found.append(measured(engine, options))

    def median(engine: str, name: str, index: int | None = None) -> float:
        return statistics.median(one[name] if index is None else one[name][index] for one in rounds[engine])

    devices = {"host": 0, **({"device": 1} if device_type() == "cuda" else {})}
    print(f"\n{options.size}, {options.ranks} ranks, {device_type()}, medians of {options.rounds}; seconds and MiB")
    heads = ["", "part", "step", "save", *(f"its peak, {d}" for d in devices), "call", "slower steps", "on disk",
             *(f"peak, {d}" for d in devices)]  # fmt: skip
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for engine in rounds:
        cells = [f"{median(engine, 'part') / MIB:.0f}",
                 *(f"{median(engine, name):.2f}" for name in ("step", "save")),
                 *(f"{median(engine, 'save peak', i) / MIB:.0f}" for i in devices.values()),
                 *(f"{median(engine, name):.2f}" for name in ("call", "slower", "ready")),
                 *(f"{median(engine, 'peak', i) / MIB:.0f}" for i in devices.values())]  # fmt: skip
        print(f"| {engine} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
