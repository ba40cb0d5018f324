# ruff: noqa: E501 - tables of code are easier to read on one line
"""A scaler and an optimizer, however it is made, that are handed on to a function of another file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

FIT = """import torch
import torch.nn.functional as F


def fit(model, data, optimizer, scaler):
    for x, y in data:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def run(net, batches, opt, scaling):
    fit(net, batches, opt, scaling)
"""
HEAD = """from functools import partial

import torch
from torch import nn, optim

from fit import fit, run


def make(model):
    made = optim.Adam(model.parameters(), lr=0.01)
    return made


model = nn.Linear(4, 1)
data = torch.randn(4, 4, 4), torch.randn(4, 4, 1)
"""
SCALER = "scaler = torch.amp.GradScaler('cpu', enabled=False)\n"
CALL = "fit(model, zip(*data), optimizer, scaler)\n"
MADE = {
    "one of a table": 'optimizer = {"adam": optim.Adam(model.parameters()), "sgd": optim.SGD(model.parameters())}[name]',
    "one of two": "optimizer = optim.Adam(model.parameters()) if adam else optim.SGD(model.parameters())",
    "a class of a table": 'optimizer = {"adam": optim.Adam}[name](model.parameters())',
    "a class by its name": "optimizer = getattr(optim, name)(model.parameters())",
    "a function": "optimizer = make(model)",
    "one of what a function gives": "optimizer, schedule = build(model)",
    "partial": "optimizer = partial(optim.Adam, lr=0.01)(model.parameters())",
}  # fmt: skip
CALLS = {
    "by position": CALL,
    "by name": "fit(model=model, data=zip(*data), optimizer=optimizer, scaler=scaler)\n",
    "through another function": "run(model, zip(*data), optimizer, scaler)\n",
}


def converted_train(tmp_path: Path, text: str) -> str:
    (tmp_path / "fit.py").write_text(FIT)
    (tmp_path / "train.py").write_text(text)
    results = convert_paths([tmp_path / "fit.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert not any(result.error for result in results)
    return results[1].after.decode()


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_manager_is_told_the_optimizer(tmp_path: Path, made: str, call: str) -> None:
    after = converted_train(tmp_path, f"{HEAD}{made}\n{SCALER}{call}")
    assert "scaler.add_optimizer(optimizer)" in after


def test_what_the_scaler_does_not_step_is_left(tmp_path: Path) -> None:
    after = converted_train(tmp_path, f"{HEAD}optimizer = make(model)\n{SCALER}{CALL.replace('model, ', 'other, ')}")
    assert after.count("add_optimizer") == 1
