"""What a model chooses by the mean over a batch is told; what it chooses for each item is not."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def score(x):
    return {function}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        {choice}
        return self.inner(x) * best.float().mean()


loader = DataLoader(TensorDataset(torch.randn(32, 8)), batch_size=8)
model = Model()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for (x,) in loader:
    loss = model(x).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
ALONE = {
    "of each item": "best = torch.topk(x, 2)[1]",
    "of means of each item": "best = x.view(-1, 4, 2).mean(2).argmax(1)",
    "of weights": "best = self.inner.weight.mean(0).argmax()",
    "a mean that chooses nothing": "best = x.mean(0)",
    "of a constant": "best = torch.arange(4).sort()[1]",
}
TOGETHER = {
    "topk": "best = torch.topk(x.mean(0), 2)[1]",
    "a method": "best = x.abs().mean(dim=0).topk(2)[1]",
    "by a name": "means = torch.mean(x, dim=0)\n        best = torch.argsort(means)",
    "of one changed": "means = x.mean(0)\n        means[0] = 0\n        _, best = torch.topk(means, 2)",
    "of more means": "best = x.view(-1, 4, 2).mean(0).mean(-1).argmax()",
    "of a spread": "best = x.std(0).argmax()",
    "in a function": "best = score(x)",
}


def told(choice: str) -> list[str]:
    result = convert_text(
        SCRIPT.format(choice=choice, function="torch.topk(x.mean(0), 2)[1]" if "score" in choice else "x")
    )
    assert not result.error
    return [said.message for said in result.reported if "chooses together" in said.message]


@pytest.mark.parametrize("choice", ALONE.values(), ids=ALONE.keys())
def test_choices_of_items(choice: str) -> None:
    assert told(choice) == []


@pytest.mark.parametrize("choice", TOGETHER.values(), ids=TOGETHER.keys())
def test_choices_of_a_batch(choice: str) -> None:
    assert len(told(choice)) == 1
