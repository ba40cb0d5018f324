"""What a loss is computed by is shown as it is: a function, or an object that is called, is no loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

LOSSES = """import functools
import torch.nn.functional as F

key2loss = {"cross_entropy": F.cross_entropy}


def get_loss_function(name):
    if name is None:
        return F.cross_entropy
    return functools.partial(key2loss[name])


def build_loss(name):
    return key2loss[name]


class FocalLoss:
    def __call__(self, a, b):
        return F.mse_loss(a, b)
"""
SCRIPT = """import functools
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from losses import FocalLoss, build_loss, get_loss_function, key2loss


def epoch(model, optimizer, loss_fn, loader):
    for x, y in loader:
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item())


def main(name, data):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data, batch_size=4)
    loss_fn = {made}
    print(f"using {{loss_fn}}", loss_fn)
    {run}


main("cross_entropy", [])
"""
HERE = """for x, y in loader:
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item())"""
THERE = "epoch(model, optimizer, loss_fn, loader)"
MADE = [
    "get_loss_function(name)",
    "build_loss(name)",
    "key2loss[name]",
    "getattr(F, name)",
    "functools.partial(F.cross_entropy, label_smoothing=0.1)",
    "torch.nn.CrossEntropyLoss()",
    "FocalLoss()",
    "get_loss_function(name) if name else F.mse_loss",
    "lambda a, b: F.mse_loss(a, b)",
]


@pytest.mark.parametrize("run", [HERE, THERE], ids=["here", "there"])
@pytest.mark.parametrize("made", MADE)
def test_a_loss_function_is_no_loss(tmp_path: Path, made: str, run: str) -> None:
    files = {"losses.py": LOSSES, "train.py": SCRIPT.format(made=made, run=run)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    results = convert_paths([tmp_path / name for name in files], Options(), [tmp_path])
    after = next(one.after.decode() for one in results if one.path.name == "train.py")
    assert 'bmt.print_rank(f"using {loss_fn}", loss_fn)' in after
    assert "bmt.print_rank(bmt.sum_loss(loss).item())" in after
