"""Metrics of numpy's arrays are no losses: nothing of them is reported as one that compares items."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

CORR = """
def corr_loss(pred, true):
    u = ((true - true.mean(0)) * (pred - pred.mean(0))).sum(0)
    d = {0}.sqrt(((true - true.mean(0)) ** 2 * (pred - pred.mean(0)) ** 2).sum(0))
    return (u / d).mean()
"""
TRAIN = """import torch
from metrics import corr_loss

net = torch.nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4):
    loss = {loss}
    opt.zero_grad()
    loss.backward()
    opt.step()
print(corr_loss(net(x).detach().numpy(), x.numpy()))
"""


def told(folder: Path, metrics: str, loss: str) -> bool:
    (folder / "metrics.py").write_text(metrics)
    (folder / "train.py").write_text(TRAIN.format(loss=loss))
    found = convert_paths([folder / "metrics.py", folder / "train.py"], Options())
    return any(said.code == "BMT091" for item in found for said in item.reported)


def test_of_numpy(tmp_path: Path) -> None:
    assert not told(tmp_path, "import numpy as np\n" + CORR.format("np"), "net(x).square().mean()")


@pytest.mark.parametrize("head", ["import torch\n", "import torch\nimport numpy as np\n"])
def test_of_torch(tmp_path: Path, head: str) -> None:
    assert told(tmp_path, head + CORR.format("torch"), "corr_loss(net(x), x)")
