"""What converting costs the host, in one process: an ordinary GPT-2 and the converted one take turns.

    torchrun --nproc_per_node=2 examples/benchmark/in_turns.py tiny --batch 8

Hosts differ from process to process, and from minute to minute; models that take turns see the same.  On several ranks
the ordinary one is trained with DDP.  For each phase of a step it prints how long the host took (median and 10th
percentile, milliseconds), and for the step also until the device was through.  Memory is not compared: both models are
there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

import bmtrain as bmt

HERE = Path(__file__).parent
PHASES = ["forward", "backward", "clip", "step", "zero_grad", "the host's step", "step on the device"]
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL = int(os.environ.get("LOCAL_RANK", "0"))


def module_at(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


class ByHand:
    """Plain torch; DDP on several ranks."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, device = model, next(model.parameters()).device
        if RANKS > 1:
            on = [device] if device.type == "cuda" else None
            self.model = torch.nn.parallel.DistributedDataParallel(model, device_ids=on)
        self.optimizer = torch.optim.AdamW(groups_of(self.model), lr=3e-4, fused=True)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class Converted:
    """What bmt-convert makes of the same."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.optimizer = bmt.optim.AdamOptimizer(groups_of(model), lr=3e-4, weight_decay=0.01)
        self.manager = bmt.optim.OptimManager(loss_scale=None)
        self.manager.add_optimizer(self.optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        self.manager.backward(loss)

    def clip(self) -> None:
        self.manager.clip_grad_norm(self.optimizer.param_groups, 1.0)

    def step(self) -> None:
        self.manager.step()

    def zero_grad(self) -> None:
        self.manager.zero_grad()


def timed(side: ByHand | Converted, tokens: torch.Tensor, steps: int) -> list[list[float]]:
    """For each step, milliseconds by phase."""
    found = []
    through = torch.cuda.synchronize if tokens.is_cuda else (lambda: None)
    for _ in range(steps):
        through()
        at = [time.perf_counter()]
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            loss = side.model(tokens[:, :-1], tokens[:, 1:])
        at.append(time.perf_counter())
        side.backward(loss)
        at.append(time.perf_counter())
        for phase in (side.clip, side.step, side.zero_grad):
            phase()
            at.append(time.perf_counter())
        through()
        end = time.perf_counter()
        phases = [after - before for before, after in pairwise(at)]
        found.append([1e3 * seconds for seconds in (*phases, at[-1] - at[0], end - at[0])])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    plain = module_at(HERE / "gpt" / "gpt.py", "gpt_plain")
    parser.add_argument("size", nargs="?", default="tiny", choices=plain.SIZES)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each rank")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--compile", action="store_true", help="as torch.compile(model) does, and is converted to")
    parser.add_argument("--rounds", type=int, default=10, help="how often each takes its turn of ten steps")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL)
    if RANKS > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    bmt.init_distributed(seed=0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", LOCAL) if cuda else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rewriter", str(HERE / "gpt"), "--output", f"{folder}/gpt", "--quiet"]
        tree = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": tree}
        subprocess.run(command, check=False, env=env, capture_output=True)  # 3: by_hand.py was left as it is
        converted = module_at(Path(folder) / "gpt" / "gpt.py", "gpt_converted")
    layers, width, heads, vocabulary = plain.SIZES[options.size]
    models = [made.GPT(layers, width, heads, vocabulary, options.length).to(device) for made in (plain, converted)]
    if options.compile:
        models[0].compile()
        bmt.compile(models[1])
    sides: dict[str, ByHand | Converted] = {
        "DDP" if RANKS > 1 else "plain": ByHand(models[0]),
        "converted": Converted(models[1]),
    }
    torch.manual_seed(RANK)
    tokens = torch.randint(0, vocabulary, (options.batch, options.length + 1), device=device)
    found: dict[str, list[list[float]]] = {name: [] for name in sides}
    for side in sides.values():
        timed(side, tokens, 15)  # until what is decided in the first steps is decided
    for _ in range(options.rounds):
        for name, side in sides.items():
            found[name] += timed(side, tokens, 10)
    if RANK == 0:
        kind = f"{options.size}:{options.batch}{', compiled' * options.compile}"
        print(f"{kind}, {RANKS} rank{'s' * (RANKS > 1)}, median (10th percentile), ms")
        print(f"{'':20}" + "".join(f"{name:>20}" for name in found))
        for number, phase in enumerate(PHASES):
            columns = [sorted(row[number] for row in rows) for rows in found.values()]
            cells = [f"{statistics.median(column):.2f} ({column[len(column) // 10]:.2f})" for column in columns]
            print(f"{phase:20}" + "".join(f"{cell:>20}" for cell in cells))
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
