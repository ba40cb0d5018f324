"""A loss that is a sum over the batch, divided by how many items the batch has: a mean on any share, not reported."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

net = nn.Linear(2, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
{function}

for x, y in DataLoader(data, 8):
    n = x.size(0)
    p = net(x)
    loss = {loss}
    loss.backward()
    opt.step()
"""
CRIT = 'crit = nn.MSELoss(reduction="sum")'
TERMS = """

def total(p, y):
    fit = F.mse_loss(p, y, reduction="sum")
    prior = -0.5 * torch.sum(1 + p)
    return (fit + prior) / y.size(0)
"""
MEANS = {
    "by a name": (CRIT, "crit(p, y) / n"),
    "by len": (CRIT, "crit(p, y) / len(x)"),
    "by the shape": (CRIT, "crit(p, y) / x.shape[0]"),
    "of two terms": (CRIT, "(crit(p, y) + p.sum()) / n"),
    "by a function": (TERMS, "total(p, y)"),
}
SUMS = {
    "by nothing": (CRIT, "crit(p, y)"),
    "by a number": (CRIT, "crit(p, y) / 8"),
    "beside a sum": (CRIT, "crit(p, y) / n + p.sum()"),
    "beside a mean": (CRIT, "crit(p, y) / 8 + p.mean()"),
    "by another name": (CRIT, "crit(p, y) / size"),
}


def speaks_of_sums(function: str, loss: str) -> bool:
    result = convert_text(SCRIPT.format(function=function, loss=loss))
    assert not result.error
    reported = any("a sum over a rank's share" in item.message for item in result.reported)
    return reported or b"world_size()" in result.after


@pytest.mark.parametrize(("function", "loss"), MEANS.values(), ids=MEANS.keys())
def test_a_mean_is_none(function: str, loss: str) -> None:
    assert not speaks_of_sums(function, loss)


@pytest.mark.parametrize(("function", "loss"), SUMS.values(), ids=SUMS.keys())
def test_a_sum_is_the_whole_batchs_or_reported(function: str, loss: str) -> None:
    assert speaks_of_sums(function, loss)
