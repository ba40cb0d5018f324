"""A model in which a mean over the batch meets each item is told of; means of layers, lists and sequences are not."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("unused", torch.zeros(1))

{graph}    def heads(self, x):
        return torch.stack([self.inner(x), x]).mean(0).sigmoid()

    def forward(self, x):
        {shape}
        {made}
        return self.inner(x)


loader = DataLoader(TensorDataset(torch.randn(32, 8)), batch_size=8)
model = Model()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for (x,) in loader:
    loss = model(x).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
BATCH = "b, d = x.shape"
GRAPH = """    def graph(self, x):
        scores = F.softmax(x.unsqueeze(1) * x.unsqueeze(2), dim=2)
        mean = torch.mean(scores, dim=0)
        degree = torch.sum(mean, dim=1)
        return torch.diag(1 / torch.sqrt(degree)) @ mean

"""
OF_ALL = {
    "standardised": "x = (x - x.mean(0)) / x.std(0)",
    "a root": "x = x * torch.sqrt(x.var(0) + 1e-8).mean()",
    "minibatch deviation": (
        "y = x.view(2, -1, 8)\n        y = torch.sqrt(y.var(0, unbiased=False) + 1e-8)\n        x = x + y.mean()"
    ),
    "a gate": "x = x * x.mean(dim=0, keepdim=True).sigmoid()",
    "a product": "x = x @ torch.outer(x.mean(0), x.mean(0))",
    "a power": "x = x * x.mean(0) ** 2",
    "by a name": "means = x.mean(0)\n        scale = means.abs()\n        x = x / scale",
    "weights of classes": "x = x * F.softmax(x.mean(0), dim=-1)",
}
OF_EACH = {
    "of each item": "x = x / x.std(1, keepdim=True)",
    "added": "x = x + x.mean(0)",
    "of weights": "x = x * self.inner.weight.mean(0).sigmoid()",
    "of a constant": "x = x * torch.ones(4, 8).mean(0).sqrt()",
    "of layers": "x = x * torch.stack([self.inner(x), x]).mean(0).sigmoid()",
    "only written down": "with torch.no_grad():\n            print(x.mean(0).sqrt())",
}


def told(made: str, shape: str = BATCH) -> list[str]:
    result = convert_text(SCRIPT.format(made=made, shape=shape, graph=GRAPH if "graph" in made else ""))
    assert not result.error
    return [said.message for said in result.reported if "meets each item" in said.message]


@pytest.mark.parametrize("made", OF_EACH.values(), ids=OF_EACH.keys())
def test_what_each_item_is_by_itself(made: str) -> None:
    assert not told(made)


@pytest.mark.parametrize("shape", ["length, b, d = 1, *x.shape", "n, d = x.shape", "d = x.size(1)"])
def test_where_nothing_says_that_it_is_the_batch(shape: str) -> None:
    assert not told("x = x * x.mean(0).sigmoid()", shape)


@pytest.mark.parametrize("made", OF_ALL.values(), ids=OF_ALL.keys())
def test_what_is_made_of_all_items(made: str) -> None:
    assert len(told(made)) == 1


@pytest.mark.parametrize("shape", ["bat, N = x.size()", "batch_size = x.size(0)", "bs = x.shape[0]", "B, _ = x.shape"])
def test_a_graph_that_the_batch_makes(shape: str) -> None:
    assert len(told("x = x @ self.graph(x)", shape)) == 1
