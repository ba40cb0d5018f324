"""``torchrun -m bmtrain.benchmark.probe FILE``: times one all-gather between the ranks and writes it as json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..context import context, init_distributed, shutdown
from .bandwidth import time_all_gather


def main(path: str) -> None:
    """Rank 0 writes bytes, seconds, transport and device to ``path``."""
    init_distributed()
    here = context()
    size = 1 << (27 if here.device.is_cuda else 22)
    found = {
        "ranks": here.world_size, "bytes": size, "seconds": time_all_gather(size),
        "device": here.device.torch_device.type,
    }  # fmt: skip
    if here.rank == 0:
        Path(path).write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
