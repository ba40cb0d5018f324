"""A seed that differs by rank stays where it is: rank 0's initial values are used on all ranks, as DDP does."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP


def main(args, cfg):
    if args.distributed:
        dist.init_process_group("nccl")
    rank = dist.get_rank() if args.distributed else 0
    {seed}
    data = torch.randn(8, 4)
    net = torch.nn.Linear(4, 4)
    {wrapped}
    opt = torch.optim.AdamW(net.parameters())
    for step in range(4):
        net(data).mean().backward()
        opt.step()
        opt.zero_grad()


main(None, None)
"""
WRAPPED = {
    "always": "net = DDP(net)",
    "under a test": "if args.distributed:\n        net = DDP(net)",
    "under a test, with more": "if args.distributed:\n        net = DDP(net)\n        raw = net.module",
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("seed", ["cfg.SEED + rank", "5 + dist.get_rank()", "args.seed * 100 + args.rank"])
def test_it_stays_in_front_of_the_model(seed: str, wrapped: str) -> None:
    after = converted(SCRIPT.format(seed=f"torch.manual_seed({seed})", wrapped=wrapped))
    seeded = f"    torch.manual_seed({seed.replace('dist.get_rank', 'bmt.rank')})\n    data ="
    assert after.count("torch.manual_seed") == 1 and seeded in after and "DDP(net)" not in after
