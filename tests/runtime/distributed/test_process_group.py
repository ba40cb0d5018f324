"""``torch.distributed`` in code that is not converted."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import on_ranks

import bmtrain as bmt


@on_ranks(1, 2)
def test_torch_distributed_has_the_ranks_of_the_job() -> None:
    bmt.distributed.register_process_group()
    bmt.distributed.register_process_group()  # a second time changes nothing
    assert (dist.get_rank(), dist.get_world_size()) == (bmt.rank(), bmt.world_size())
    parts = [torch.zeros(2) for _ in range(bmt.world_size())]
    dist.all_gather(parts, torch.full((2,), float(bmt.rank())))
    assert [part[0].item() for part in parts] == list(range(bmt.world_size()))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == bmt.world_size()
    said: list[object] = [None] * bmt.world_size()
    dist.all_gather_object(said, {"rank": bmt.rank()})
    assert said == [{"rank": rank} for rank in range(bmt.world_size())]
    bmt.synchronize()
