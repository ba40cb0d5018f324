"""A whole model that one rank pickles is given by all ranks."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """import copy
import os
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.history = []

    def forward(self, x):
        return self.a(x)


class Trainer:
    def __init__(self, rank):
        self.rank = rank
        self.net = Net()
        self.model = DDP(torch.nn.Sequential(self.net))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.best, self.seen = 1.0, []

    def train(self, loader):
        for x in loader:
            loss = self.model(x).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def save(self, path):
        if self.rank == 0:
            {save}


dist.init_process_group("gloo")
Trainer(int(os.environ["RANK"])).train([torch.ones(2, 4)])
"""
SAVES = {
    "itself": "torch.save(self.model, path)",
    "unwrapped": "torch.save(self.model.module, path)",
    "what it is made around": "torch.save(self.net, path)",
    "a part": "torch.save(self.net.a, path)",
    "in a table": "torch.save({'net': self.net, 'best': self.best}, path)",
    "in a list": "torch.save([1, (self.net,)], path)",
    "by name": "net = self.net\n            torch.save(net, path)",
    "by keyword": "torch.save(obj=self.net, f=path)",
    "under a test": "if self.best:\n                torch.save(self.net, path)",
    "a copy": "torch.save(copy.deepcopy(self.net).cpu(), path)",
}
OTHERS = {"a list": "torch.save(self.seen, path)", "a number": "torch.save({'best': self.best}, path)"}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_model_stays_one_ranks(name: str) -> None:
    assert f"        if self.rank == 0:\n            {OTHERS[name]}\n" in converted(SCRIPT.format(save=OTHERS[name]))


@pytest.mark.parametrize("name", SAVES)
def test_all_ranks_give_the_model(name: str) -> None:
    after = converted(SCRIPT.format(save=SAVES[name]))
    assert "bmt.save_checkpoint(" in after and "self.rank == 0" not in after and "torch.save" not in after
