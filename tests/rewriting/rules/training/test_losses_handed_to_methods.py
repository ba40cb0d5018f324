"""Dicts of losses that a loop hands to a method which shows them: the method is told, as nobody averages them."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter


class Trainer:
    def __init__(self, weights):
        self.net, self.weights, self.step = nn.Linear(4, 4), weights, 0
        self.opt = torch.optim.Adam(self.net.parameters())
        self.writer = SummaryWriter("logs")
        self.loader = DataLoader(TensorDataset(torch.randn(32, 4), torch.randn(32, 4)), batch_size=8)

    def compute_losses(self, x, y):
        out = self.net(x)
        losses = {{"l1": (out - y).abs().mean(), "l2": (out - y).square().mean()}}
        losses["loss"] = losses["l1"] + losses["l2"]
        return losses

    def run(self):
        for x, y in self.loader:
            losses = self.compute_losses(x, y)
            {total}
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            {hand}
            self.step += 1

    {method}


Trainer({{"l1": 0.5}}).run()
"""
ENTRY = SCRIPT.replace("            {total}\n", "").replace("loss.backward()", 'losses["loss"].backward()')
TOTALS = {
    "an entry": ENTRY,
    "a sum": SCRIPT.replace("{total}", "loss = sum(losses.values())"),
    "added": SCRIPT.replace("{total}", 'loss = losses["l1"] + 0.5 * losses["l2"]'),
}
METHODS = {
    "a loop": (
        "self.log(losses)",
        "def log(self, given):\n        for k, v in given.items():\n            self.writer.add_scalar(k, v, 1)",
    ),
    "numbers": (
        "self.log(losses)",
        "def log(self, found):\n        for k, v in found.items():\n            print(k, v.item())",
    ),
    "values": ("self.log(losses)", "def log(self, found):\n        print([v.item() for v in found.values()])"),
    "an entry": ("self.log(losses)", "def log(self, losses):\n        print(losses['l1'].item())"),
    "by name": (
        "self.log(1, found=losses)",
        "def log(self, at, found):\n        print({k: v.item() for k, v in found.items()})",
    ),
    "one": ('self.log(losses["l2"].cpu().data)', 'def log(self, loss):\n        print("{:.3f}".format(loss))'),
    "a number": ('self.log(losses["l1"].item())', 'def log(self, loss):\n        print(f"{loss:.3f}")'),
}
QUIET = {
    "weights": ("self.log(self.weights)", "def log(self, found):\n        print([v for v in found.values()])"),
    "a count": ("self.log(self.step)", 'def log(self, loss):\n        print(f"{loss:.3f}")'),
    "averaged": ('self.log(losses["loss"].item())', 'def log(self, loss):\n        print(f"{loss:.3f}")'),
    "not shown": ("self.log(losses)", "def log(self, losses):\n        self.last = losses"),
}


def told(script: str, hand: str, method: str) -> list[str]:
    result = convert_text(script.format(hand=hand, method=method))
    assert not result.error and b"OptimManager" in result.after
    return [said.message for said in result.reported if "is of this rank's share of the batch" in said.message]


@pytest.mark.parametrize(("hand", "method"), QUIET.values(), ids=QUIET.keys())
def test_what_is_no_loss_of_a_share_is_not_told(hand: str, method: str) -> None:
    assert told(ENTRY, hand, method) == []


@pytest.mark.parametrize("script", TOTALS.values(), ids=TOTALS.keys())
@pytest.mark.parametrize(("hand", "method"), METHODS.values(), ids=METHODS.keys())
def test_a_method_that_shows_losses_is_told(hand: str, method: str, script: str) -> None:
    (message,) = told(script, hand, method)
    assert "in Trainer.log" in message and "bmt.sum_loss(" in message
