# ruff: noqa: E501 - tables of code are easier to read on one line
"""Losses that are kept as tensors: the least, the last few, averages that move, rows of tables."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted, printed

SCRIPT = """import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
inputs = torch.randn(48, 5)
data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
model = torch.nn.Linear(5, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=12, shuffle=True)
{before}
for epoch in range(2):
    for step, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        {each}
    {after}
"""
TABLE = """class Table:
    def __init__(self):
        self.rows = []

    def add_row(self, row):
        self.rows.append(row)

    def show(self):
        print([f"{value:.4f}" for _, value in self.rows])


table = Table()"""
KEPT: dict[str, tuple[str, str, str]] = {
    "least": ("best = float('inf')", "best = min(best, loss)", "print('best %.4f' % best)"),
    "torch's most": ("worst = torch.tensor(0.0)", "worst = torch.maximum(worst, loss)", "print(f'{worst:.4f}')"),
    "of two methods": ("best = torch.tensor(1e9)", "best = best.min(loss.detach())", "print(f'{best:.4f}')"),
    "numpy's least": ("best = np.inf", "best = np.minimum(best, loss.detach().numpy())", "print(f'{float(best):.4f}')"),
    "under a test": ("best = 1e9", "if loss < best:\n    best = loss", "print(f'{float(best):.4f}')"),
    "one of two": ("low = None", "v = loss.detach()\nlow = v if low is None or v < low else low", "print(f'{low:.4f}')"),
    "behind the loop": ("best = None", "last = loss", "best = last if best is None else torch.min(best, last)\nif last > best: print('worse')\nprint(f'{best:.4f}')"),
    "beside another": ("best, bad = None, 0", "last = loss.detach()", "if best is None or last < best:\n    best, bad = last, 0\nelse:\n    bad += 1\nprint(f'{best:.4f}', bad)"),
    "in an attribute": ("class Log: pass\nlog = Log()\nlog.best = torch.tensor(1e9)", "log.best = torch.min(log.best, loss.detach())", "print(f'{log.best.item():.4f}')"),
    "mixed in place": ("ema = torch.zeros(())", "with torch.no_grad():\n    ema.mul_(0.9).add_(loss, alpha=0.1)", "print(f'{float(ema):.4f}')"),
    "lerp": ("ema = torch.tensor(1.0)", "ema = torch.lerp(ema, loss.detach(), 0.1)", "print(f'{ema:.4f}')"),
    "lerp from the first": ("ema = None", "ema = loss.detach() if ema is None else torch.lerp(ema, loss.detach(), 0.2)", "print(f'{ema:.4f}')"),
    "an average of what is clamped": ("ema = torch.tensor(0.)", "ema = ema * 0.9 + loss.detach().clamp(max=2.0) * 0.1", "print(f'{ema:.4f}')"),
    "an average of squares": ("square = 0.0", "square = 0.9 * square + 0.1 * loss.detach() ** 2", "print(f'{square:.4f}')"),
    "rows of one": ("losses = []", "losses.append(loss.unsqueeze(0))", "print(f'{torch.cat(losses).mean().item():.4f}')"),
    "views of one": ("losses = []", "losses.append(loss.detach().view(1))", "print(f'{torch.cat(losses).std():.4f}')"),
    "lists that are added": ("losses = []", "losses += [loss.reshape(1)]", "print(f'{torch.cat(losses).max():.4f}')"),
    "a table": (TABLE, "last = loss", "table.add_row([epoch, last])\ntable.show()"),
}  # fmt: skip
APART = {
    "a number": ("best = 1e9", "best = min(best, loss.item())", "print(f'{best:.4f}')"),
    "a multiple": ("ema = 0.0", "ema = 0.9 * ema + 0.1 * loss.detach()", "print(f'{ema:.4f}')"),
    "a list": ("losses = []", "losses.append(loss.detach())", "print(f'{min(losses):.4f} {max(losses):.4f}')"),
}


def script(parts: tuple[str, str, str]) -> str:
    before, each, after = parts
    text = SCRIPT.replace("{before}", before)
    return text.replace("{each}", each.replace("\n", "\n        ")).replace("{after}", after.replace("\n", "\n    "))


@pytest.mark.parametrize("parts", [*KEPT.values(), *APART.values()], ids=[*KEPT, *APART])
def test_losses_that_are_kept_are_averaged_first(parts: tuple[str, str, str]) -> None:
    text = script(parts)
    assert "bmt.sum_loss(" in converted(text)
    assert not [finding.message for finding in convert_text(text).reported if finding.differs]


@pytest.mark.parametrize("kind", ["least", "under a test", "behind the loop", "lerp from the first", "a table"])
def test_what_is_kept_is_that_of_one_process(kind: str) -> None:
    (wanted,) = run_ranks(1, printed, script(KEPT[kind]), initialize=False)
    first, second = run_ranks(2, printed, converted(script(KEPT[kind])), initialize=False, fresh=True)
    assert first == wanted and second == []


TRAINED = {
    "the least of two": ("loss = torch.minimum(a, b)", True),
    "of a list": ("loss = max([a, b])", True),
    "of a stack": ("loss = torch.stack([a, b]).max()", True),
    "topk": ("loss = torch.stack([a, b]).topk(1).values.sum()", True),
    "not below zero": ("loss = a + max(b - 3.0, torch.zeros(()))", True),
    "where": ("loss = torch.where(a > b, a, b)", True),
    "a test": ("if a > b:\n    loss = a\nelse:\n    loss = b", True),
    "a choice": ("loss = a if a > b else b", True),
    "the best of several": ("loss = None\nfor n in (1, 2):\n    one = F.mse_loss(out * n, y)\n    loss = one if loss is None else torch.min(loss, one)", True),
    "weights of losses": ("w = torch.softmax(torch.stack([a, b]).detach(), 0)\nloss = w[0] * a + w[1] * b", True),
    "weights by settings": ("w = torch.tensor([0.3, 0.7])\nloss = w[0] * a + w[1] * b", False),
    "of items": ("loss = torch.max(F.mse_loss(out, y, reduction='none'), F.l1_loss(out, y, reduction='none')).mean()", False),
    "parts in a list": ("parts = []\nfor n in (1, 2):\n    parts += [F.mse_loss(out * n, y).view(1)]\nloss = torch.cat(parts).mean()", False),
    "added in place": ("loss = torch.zeros(())\nfor n in (1, 2):\n    one = F.mse_loss(out * n, y)\n    loss.add_(one)", False),
}  # fmt: skip


@pytest.mark.parametrize(("code", "is_told"), TRAINED.values(), ids=TRAINED.keys())
def test_losses_that_are_trained_on_are_left(code: str, is_told: bool) -> None:
    """What is chosen among means is another on a rank's share, which is said; nothing is averaged that is trained."""
    made = "out = model(x)\n        a, b = F.mse_loss(out, y), F.l1_loss(out, -y)\n        "
    text = script(("", "pass", "pass")).replace(
        "loss = F.mse_loss(model(x), y)", made + code.replace("\n", "\n        ")
    )
    assert "sum_loss" not in converted(text)
    assert is_told == any("another function of a mean" in finding.message for finding in convert_text(text).reported)


def test_the_least_that_a_function_gives_back_to_be_trained_is_left() -> None:
    text = script(("", "pass", "pass")).replace("loss = F.mse_loss(model(x), y)", "loss = least(model(x), y)")
    function = """
def least(out, y):
    best = None
    for sign in (1, -1):
        one = F.mse_loss(out * sign, y)
        best = one if best is None else torch.minimum(best, one)
    return best


model = """
    text = text.replace("\nmodel = ", function, 1)
    assert "sum_loss" not in converted(text)
