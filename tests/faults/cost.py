"""What the diary and the watchdog cost: a tiny model's step on two ranks, with and without, in turns.

    python -m tests.faults.cost [ROUNDS]

Of each round: seconds of the script's thread and of the whole process (the watchdog's thread and gloo's included).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time

import torch
from torch import nn

import bmtrain as bmt

from .judge import free_port

STEPS = 150


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def round_(watch: bool) -> tuple[float, float]:
    """Milliseconds of a step: of this thread, and of the process."""
    bmt.init_distributed(device="cpu", seed=1, watch=watch)
    net = bmt.BMTrainModelWrapper(nn.Sequential(*(bmt.CheckpointBlock(Cell()) for _ in range(4))))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(net.parameters(), lr=1e-3))
    x = torch.randn(16, 64)
    for step in range(20 + STEPS):
        if step == 20:
            thread, process = time.thread_time(), time.process_time()
        loss = net(x).square().mean()
        manager.zero_grad()
        manager.backward(loss)
        manager.step()
        bmt.sum_loss(loss)
    result = (time.thread_time() - thread) / STEPS * 1e3, (time.process_time() - process) / STEPS * 1e3
    bmt.synchronize()
    bmt.shutdown()
    return result


def rank(number: int, ports: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number), MASTER_ADDR="127.0.0.1")
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(2 * rounds):
        os.environ["MASTER_PORT"] = str(ports[turn])
        watch = turn % 4 in (1, 2)  # off, on, on, off, ...
        found[watch].append(round_(watch))
    if number == 0:
        for index, what in enumerate(("the script's thread", "the process")):
            on, off = (statistics.median(times[index] for times in found[watch]) for watch in (True, False))
            low_on, low_off = (min(times[index] for times in found[watch]) for watch in (True, False))
            print(f"{what}: median {off:.3f} ms off, {on:.3f} on ({on / off - 1:+.2%}); ", end="")
            print(f"best {low_off:.3f} off, {low_on:.3f} on ({low_on / low_off - 1:+.2%})", flush=True)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    ports = [free_port() for _ in range(2 * rounds)]
    processes = [multiprocessing.Process(target=rank, args=(number, ports, rounds)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
