"""One rank of one measurement: trains one engine, and rank 0 prints a line `RESULT {json}`.

Started by run.py; by hand:

    torchrun --standalone --nproc_per_node=4 worker.py bmtrain --size 7b --batch 2 --recompute full
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any, NoReturn

import torch
from torch import Tensor

from engines import ENGINES, Step
from model import SIZES
from startup import measure_startup
from streams import profile_steps, summary

GIB = 2**30


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--batch", type=int, required=True, help="sequences per rank and step")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--recompute", choices=["full", "none", "auto"], default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--clip", type=float, default=0.0, help="largest gradient norm; 0 does not clip")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--startup", action="store_true", help="build the model, and run no step")
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return options


class Memory:
    """The largest use of this rank's GPU: torch's own account, and the device's, which nothing escapes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.used = 0

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def sample(self) -> None:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            self.used = max(self.used, total - free)

    def report(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        stats = torch.cuda.memory_stats()
        return {
            "active": stats["active_bytes.all.peak"] / GIB,
            "reserved": stats["reserved_bytes.all.peak"] / GIB,
            "used": self.used / GIB,
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_batches(options: argparse.Namespace, rank: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Four random batches of this rank's own: tokens and targets, each (batch, sequence)."""
    generator = torch.Generator().manual_seed(1000 + rank)
    shape = (options.batch, options.sequence + 1)
    whole = [torch.randint(SIZES[options.size].vocab, shape, generator=generator).to(device) for _ in range(4)]
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in whole]


def measure(step: Step, options: argparse.Namespace, rank: int, device: torch.device) -> dict[str, object]:
    batches = make_batches(options, rank, device)
    memory, seconds, losses = Memory(device), [], []
    for i in range(options.warmup + options.steps):
        if i == min(2, options.warmup):
            memory.reset()
        synchronize(device)
        begin = time.perf_counter()
        loss = step(*batches[i % len(batches)])
        synchronize(device)
        if i >= options.warmup:
            seconds.append(time.perf_counter() - begin)
        memory.sample()
        losses.append(loss.item())
    return {
        "milliseconds": 1e3 * statistics.median(seconds),
        "fastest": 1e3 * min(seconds),
        "slowest": 1e3 * max(seconds),
        "tokens": options.batch * options.sequence / statistics.median(seconds),
        "losses": losses,
        **memory.report(),
    }


def finish(result: dict[str, Any], rank: int, device: torch.device) -> NoReturn:
    if rank == 0:
        result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print("RESULT " + json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # every engine tears down its communicators in its own time: none of ours


def main() -> None:
    options = parse_options()
    if not options.engine.startswith("bmtrain"):  # bmtrain asks for it itself
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    torch.manual_seed(0)
    if options.startup:
        finish(measure_startup(lambda: ENGINES[options.engine](options, device), options, device), rank, device)
    step = ENGINES[options.engine](options, device)
    result = measure(step, options, rank, device)
    if options.profile and device.type == "cuda":
        batch = make_batches(options, rank, device)[0]
        events = profile_steps(lambda: step(*batch))
        result["profile"] = summary(events)
    finish(result, rank, device)


if __name__ == "__main__":
    main()
