"""Gradients that one rank reads: the ranks ask each other for them, also whether there are any."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")
rank = dist.get_rank()
net = DDP(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for step, x in enumerate(batches):
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
"""
READS = {
    "a list": (
        "    if rank == 0:\n        missing = [n for n, p in net.named_parameters() if p.grad is None]\n"
        "        print(missing)\n",
        "    missing = [n for n, p in net.named_parameters() if p.grad is None]\n    bmt.print_rank(missing)\n",
    ),
    "a loop": (
        "    if step % 2 == 0 and rank == 0:\n        for n, p in net.named_parameters():\n"
        "            if p.grad is None:\n                print(n)\n",
        "    if step % 2 == 0:\n        for n, p in net.named_parameters():\n"
        "            if p.grad is None:\n                bmt.print_rank(n)\n",
    ),
    "a value": (
        "    if rank == 0:\n        for p in net.parameters():\n            print(p.grad.norm().item())\n",
        "    for p in net.parameters():\n        bmt.print_rank(bmt.gather_grad(p).norm().item())\n",
    ),
}


@pytest.mark.parametrize(("text", "wanted"), READS.values(), ids=READS.keys())
def test_all_ranks_look(text: str, wanted: str) -> None:
    assert wanted in converted(f"{HEAD}{text}    opt.step()\n")


def test_a_guard_that_cannot_be_opened_says_why() -> None:
    text = "    if rank == 0:\n        print(net.bias.grad is None)\n    else:\n        pass\n    opt.step()\n"
    found = [f.message for f in convert_text(HEAD + text).reported]
    assert any("net.bias.grad is for all ranks, but the rank guard around it has an else branch" in m for m in found)


@pytest.mark.parametrize("text", ["        net.bias.grad = None\n", "        keep = lambda p: p.grad\n"])
def test_what_is_not_read_there_leaves_the_guard(text: str) -> None:
    assert "    if rank == 0:\n" in converted(f"{HEAD}    if rank == 0:\n{text}    opt.step()\n")
