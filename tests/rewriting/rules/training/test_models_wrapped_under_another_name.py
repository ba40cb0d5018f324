"""``net = nn.Sequential(...)``, and ``model = DDP(net)`` is trained: the model is one, whatever it is called."""

from __future__ import annotations

import pytest

from ...helpers import IMPORTS, converted

SCRIPT = (
    IMPORTS
    + """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

{ranks}
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
model = {model}
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=8, sampler=torch.utils.data.DistributedSampler(data)):
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    if {first} == 0:
        print(loss.item())
"""
)
JOIN = "dist.init_process_group('gloo')\n"
MODELS = [
    "net",
    "DDP(net)",
    "DDP(net.to(device), device_ids=[0])",
    "net.cuda()",
    "torch.compile(net)",
    "DDP(nn.SyncBatchNorm.convert_sync_batchnorm(net))",
]


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_wrapped(model: str) -> None:
    after = converted(SCRIPT.format(ranks=JOIN + "r = dist.get_rank()", model=model, first="r"))
    assert "net = bmt.BMTrainModelWrapper(nn.Sequential(" in after and after.count("BMTrainModelWrapper") == 1


def test_another_model_is_not() -> None:
    text = SCRIPT.format(ranks=JOIN + "r = dist.get_rank()", model="other(net)", first="r")
    assert "net = bmt.BMTrainModelWrapper" not in converted(text)


RANKS = {
    "alone": ("r = dist.get_rank()", "r"),
    "in a pair": ("r, w = dist.get_rank(), dist.get_world_size()", "r"),
    "behind another": ("w, r = dist.get_world_size(), dist.get_rank()", "r"),
    "of the environment": ("import os\nr, w = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])", "r"),
}


@pytest.mark.parametrize(("ranks", "first"), RANKS.values(), ids=RANKS.keys())
def test_ranks_by_any_name_are_ranks(ranks: str, first: str) -> None:
    after = converted(SCRIPT.format(ranks=JOIN + ranks, model="DDP(net)", first=first))
    assert "    bmt.print_rank(bmt.sum_loss(loss).item())" in after and "if r == 0" not in after


def test_what_is_something_else_in_a_pair_is_none() -> None:
    text = SCRIPT.format(ranks=JOIN + "r, w = dist.get_world_size(), dist.get_rank()", model="DDP(net)", first="r")
    assert "    if r == 0:\n" in converted(text)


NESTED = (
    IMPORTS
    + """
net = nn.Sequential(nn.Linear(4, 3))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
train, val = DataLoader(data, batch_size=8), DataLoader(other, batch_size=8)
for epoch in range(2):
    for {loop}:
        n = 0
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)
            if {test}:
                opt.zero_grad()
                loss.backward()
                opt.step()
            n += len(y)
        print(n)
"""
)
LOOPS = {
    "pairs": ('phase, loader in (("train", train), ("val", val))', 'phase == "train"'),
    "lists": ('phase, loader in [["train", train], ["val", val]]', 'phase == "train"'),
    "loaders": ("loader in (train, val)", "loader is train"),
    "all train": ("loader in [train, val]", "True"),
}


@pytest.mark.parametrize(("loop", "test"), LOOPS.values(), ids=LOOPS.keys())
def test_loaders_that_a_loop_goes_through_are_no_batches(loop: str, test: str) -> None:
    after = converted(NESTED.format(loop=loop, test=test))
    assert "train, val = bmt.shard_loader(DataLoader(data, batch_size=8)), " in after
    assert "n += bmt.total(len(y)" in after
