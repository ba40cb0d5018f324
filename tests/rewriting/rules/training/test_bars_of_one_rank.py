"""A bar that one rank draws around a loader is that rank's to write on, also where a guard is opened."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

dist.init_process_group("nccl")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(model.parameters(), 0.1)
loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data))
if rank == 0:
    loader = tqdm(loader)
for x in loader:
    loss = model(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    if rank == 0:
        loader.{method}
        model.eval()
        print(model(x).mean())
"""


@pytest.mark.parametrize("method", ['set_description("a")', "set_postfix(a=1)", "update(1)", "refresh()"])
def test_what_only_one_rank_has_is_left_to_it(method: str) -> None:
    after = converted(SCRIPT.format(method=method))
    assert f"    if bmt.rank() == 0:\n        loader.{method}\n    model.eval()\n" in after


def test_what_it_shows_is_made_by_all() -> None:
    after = converted(SCRIPT.format(method='set_description(f"{loss.item():.3f}")'))
    assert "    value = bmt.sum_loss(loss).item()\n    if bmt.rank() == 0:\n        loader.set_description(" in after
