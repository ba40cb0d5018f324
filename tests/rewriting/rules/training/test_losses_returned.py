"""Losses that a function which trains adds up and returns, and losses that a schedule is told, are of all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

ENGINE = """import torch
import torch.nn.functional as F


def train_one_epoch(model, opt, loader):
    total, count = 0.0, 0
    for x, y in loader:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        {added}
        count += 1
    return {given}
"""
TRAIN = """import torch
from torch.utils.data import DataLoader
from engine import train_one_epoch

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
train_loader = DataLoader(data, batch_size=8, shuffle=True)
for epoch in range(3):
    {used}
"""


def both(added: str, given: str, used: str, tmp_path: Path) -> str:
    """What becomes of the two files, once each."""
    (tmp_path / "engine.py").write_text(ENGINE.format(added=added, given=given))
    (tmp_path / "train.py").write_text(TRAIN.format(used=used))
    files = [tmp_path / "engine.py", tmp_path / "train.py"]
    after = [result.after for result in convert_paths(files, Options(), [tmp_path])]
    for path, text in zip(files, after, strict=True):
        path.write_bytes(text)
    assert [result.after for result in convert_paths(files, Options(), [tmp_path])] == after
    return b"".join(after).decode()


@pytest.mark.parametrize(
    ("added", "given", "wanted"),
    [
        ("total = total + loss.detach()", "total, count", "return bmt.sum_loss(total), count"),
        ("total = loss.detach() + total", "total / count", "return bmt.sum_loss(total) / count"),
        ("total += loss.detach()", "total / len(loader)", "return bmt.sum_loss(total) / len(loader)"),
        ("total += loss.data", "{'loss': total / count}", "return {'loss': bmt.sum_loss(total) / count}"),
        ("total += loss.detach()", "[count, total.cpu()]", "return [count, bmt.sum_loss(total).cpu()]"),
        ("total += loss.detach()", "total.item() / count", "return bmt.sum_loss(total).item() / count"),
        ("total += loss.detach(); mean = total / count", "mean", "return bmt.sum_loss(mean)"),
    ],
)
def test_a_sum_that_is_returned(added: str, given: str, wanted: str, tmp_path: Path) -> None:
    after = both(added, given, "print(train_one_epoch(net, opt, train_loader))", tmp_path)
    assert wanted in after and after.count("sum_loss") == 1


@pytest.mark.parametrize(
    ("added", "given"),
    [("total += loss.item()", "total / count"), ("total += float(loss)", "total, count"), ("pass", "count")],
)
def test_what_is_a_number_by_then(added: str, given: str, tmp_path: Path) -> None:
    after = both(added, given, "print(train_one_epoch(net, opt, train_loader))", tmp_path)
    assert f"return {given}" in after and after.count("sum_loss") == ("loss" in added)


def test_an_evaluation_returns_what_it_has(tmp_path: Path) -> None:
    text = ENGINE.format(added="total += loss.detach()", given="total / count")
    kept = "".join(line for line in text.splitlines(keepends=True) if "backward" not in line and "opt." not in line)
    (tmp_path / "engine.py").write_text(kept)
    assert "sum_loss" not in convert_paths([tmp_path / "engine.py"], Options(), [tmp_path])[0].after.decode()


@pytest.mark.parametrize("given", ["loss", "loss.detach()", "loss.data"])
def test_the_loss_of_a_step_of_another_file(given: str, tmp_path: Path) -> None:
    used = "out = train_one_epoch(net, opt, train_loader)\n    print(out.item())"
    assert "print_rank(bmt.sum_loss(out).item())" in both("pass", given, used, tmp_path)


HEAD = TRAIN.partition("from engine")[0] + TRAIN.partition("train_one_epoch\n")[2].partition("for ")[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("total / count", "bmt.sum_loss(total) / count"),
        ("total", "bmt.sum_loss(total)"),
        ("loss", "bmt.sum_loss(loss)"),
        ("loss.detach()", "bmt.sum_loss(loss).detach()"),
        ("score", "score"),
    ],
)
def test_a_schedule_is_told_the_loss(given: str, wanted: str) -> None:
    text = (
        f"{HEAD}total, count, sched = 0.0, 0, torch.optim.lr_scheduler.ReduceLROnPlateau(opt)\n"
        "for x, y in train_loader:\n    loss = torch.nn.functional.mse_loss(net(x), y)\n    loss.backward()\n"
        "    opt.step()\n    total = total + loss.detach()\n    count += 1\n"
        f"sched.step({given})\n"
    )
    assert f"sched.step({wanted})".encode() in convert_text(text).after
