"""What rank 0 alone makes, and a block reads (``with torch.no_grad():``) in a guard that every rank enters."""

from __future__ import annotations

from textwrap import indent

import pytest

from ...helpers import converted

SCRIPT = """import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

dist.init_process_group("nccl")
rank = dist.get_rank()
net = DDP(torch.nn.Linear(4, 4))
opt = torch.optim.AdamW(net.parameters())
if rank == 0:
    held_out = DataLoader(torch.ones(8, 4), batch_size=4)
    writer = SummaryWriter("logs")
for step in range(4):
    net(torch.ones(2, 4)).mean().backward()
    opt.step()
    opt.zero_grad()
    if rank == 0:
        net.eval()
        total = 0
{block}
        writer.add_scalar("error", total, step)
        net.train()
"""
LOOP = "for x in held_out:\n    total += net(x).mean().item()"
BLOCKS = {
    "no gradients": ["with torch.no_grad():", LOOP],
    "inference": ["with torch.inference_mode():", LOOP],
    "a test around it": ["if step % 2 == 0:", "with torch.no_grad():", LOOP],
    "two blocks": ["with torch.no_grad():", "with torch.autocast('cpu'):", LOOP],
    "two in one": ["with torch.no_grad(), torch.autocast('cpu'):", LOOP],
    "a loop around it": ["for _ in range(2):", "with torch.no_grad():", LOOP],
    "what is entered": ["with tqdm(held_out) as batches:", LOOP],
    "a statement before it": ["with torch.no_grad():", "count = len(held_out)\n" + LOOP],
    "a file that is read": ["with open('names.txt') as names:", LOOP],
}


def script(lines: list[str]) -> str:
    """Each line stands inside the one before."""
    block = "".join(indent(f"{line}\n", "    " * (2 + deep)) for deep, line in enumerate(lines))
    return SCRIPT.replace("{block}\n", block)


@pytest.mark.parametrize("text", BLOCKS.values(), ids=BLOCKS.keys())
def test_every_rank_makes_what_all_read(text: list[str]) -> None:
    after = converted(script(text))
    assert "\nheld_out = DataLoader(torch.ones(8, 4), batch_size=4)\n" in after
    assert 'writer = bmt.on_rank_0(SummaryWriter)("logs")' in after
    assert '    if bmt.rank() == 0:\n        writer.add_scalar("error", total, step)' in after
