"""How long it takes until a model can train, and what that needs: the model is built, no step is run."""

import resource
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model import SIZES, Config, count_parameters

GIB = 2**30


@dataclass
class Startup:
    """Of one engine's rank 0: seconds, and memory in GiB."""

    engine: str
    failure: str | None = None
    device: str = ""
    build: float = 0.0  # communicators, model, optimizer
    host: float = 0.0  # this process at its largest
    peak: float = 0.0  # of torch's allocations on the GPU, while it was built
    beside: float = 0.0  # so much of it is not needed any more
    used: float = 0.0  # on the device afterwards, by anything
    blocks: float = 0.0  # `beside` in blocks of the model
    ready: float = 0.0  # from the launch of the ranks to their end


def block_bytes(c: Config, dtype: torch.dtype) -> int:
    return (4 * c.dim**2 + 3 * c.dim * c.hidden + 2 * c.dim) * dtype.itemsize


def measure_startup(build: Callable[[], object], options: Namespace, device: torch.device) -> dict[str, float]:
    """Build, and say what it took."""
    begin = time.perf_counter()
    kept = build()
    if device.type == "cuda":
        torch.cuda.synchronize()
    result = {
        "build": time.perf_counter() - begin,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # Linux counts KiB
    }
    if device.type == "cuda":
        peak, stays = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        free, total = torch.cuda.mem_get_info()
        dtype = options.dtype if options.engine == "bmtrain" else torch.float32  # in which the weights rest
        result |= {
            "peak": peak / GIB,
            "beside": (peak - stays) / GIB,
            "used": (total - free) / GIB,
            "blocks": (peak - stays) / block_bytes(SIZES[options.size], dtype),
        }
    del kept
    return result


def print_startup(size: str, results: list[Startup], options: Namespace) -> None:
    device = next((result.device for result in results if result.device), "")
    millions = count_parameters(SIZES[size]) / 1e6
    print(f"\nstarting {size} ({millions:,.0f} M parameters), {options.ranks} ranks, {device}")
    print(f"{'engine':18}{'build s':>9}{'all s':>8}{'host':>8}{'peak':>8}{'beside':>8}{'blocks':>8}{'device':>8}")
    for result in results:
        if result.failure:
            print(f"{result.engine:18}{result.failure}")
            continue
        memory = "".join(
            f"{value:8.1f}" if device != "CPU" else f"{'-':>8}"
            for value in (result.peak, result.beside, result.blocks, result.used)
        )
        print(f"{result.engine:18}{result.build:9.1f}{result.ready:8.1f}{result.host:8.1f}{memory}")
    print("build: communicators, model and optimizer; all: from the launch of the ranks to their end.")
    print("GiB of rank 0: the process's peak on the host; torch's peak on the GPU; how much of that is given back when")
    print("the model is built, and how many of its blocks that is; all that is in use on the device afterwards.")
