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


READ = {
    "in an average": ("bar = tqdm(total=9)", "mean = total / bar.n"),
    "in a loop": ("bar = tqdm(total=9)", "stop = bar.n >= 9"),
    "in a with": ("with tqdm(total=9) as bar: pass", "stop = bar.n >= 9"),
    "a text": ("bar = tqdm(loader)", "bar.desc += str(bar.desc)"),
    "in numbers": ("bar = trange(9)", "rate = bar.format_dict['rate']"),
}
PLAIN = """import torch
from tqdm import tqdm, trange

model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), 0.1)
{made}
for x in loader:
    loss = model(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    {read}
"""


@pytest.mark.parametrize(("made", "read"), READ.values(), ids=READ.keys())
def test_a_bar_that_is_read_counts_on_every_rank(made: str, read: str) -> None:
    after = converted(PLAIN.format(made=made, read=read))
    assert 'file=None if bmt.rank() == 0 else open(os.devnull, "w")' in after and "import os\n" in after
    assert "disable=" not in after and converted(after) == after


@pytest.mark.parametrize("read", ["bar.update(1)", "bar.desc = 'a'", "other.n", "left = bar.total"])
def test_a_bar_that_is_only_written_is_disabled(read: str) -> None:
    assert "disable=bmt.rank() != 0" in converted(PLAIN.format(made="bar = tqdm(total=9)", read=read))
