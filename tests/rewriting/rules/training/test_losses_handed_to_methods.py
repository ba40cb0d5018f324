"""Losses, and dicts of them, that a loop hands to a method: one that only shows them gets those of all ranks."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.rewriting.helpers import converted

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
SHOWING = {
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
    "a sum of them": ("self.log(losses)", "def log(self, losses):\n        print(sum(losses.values()).item())"),
    "kept": (
        "self.log(losses)",
        "def log(self, losses):\n        for k, v in losses.items():\n            self.weights[k] = v.item()",
    ),
    "handed on": (
        "self.log(losses)",
        "def log(self, losses):\n        self.show(losses)\n\n"
        "    def show(self, losses):\n        print(losses['l1'].item())",
    ),
    "one": ('self.log(losses["l2"].cpu().data)', 'def log(self, loss):\n        print("{:.3f}".format(loss))'),
    "a number": ('self.log(losses["l1"].item())', 'def log(self, loss):\n        print(f"{loss:.3f}")'),
}  # fmt: skip
OTHERS = {
    "one that is not seen": (
        "self.logger.log(losses)",
        "pass\n\n\nclass Logger:\n    def log(self, losses):\n        print({k: v.item() for k, v in losses.items()})",
    ),
    "one that changes them": (
        "self.log(losses)",
        "def log(self, losses):\n        losses['l1'] = losses['l1'] * 2\n        print(losses['l1'].item())",
    ),
    "one that gives them back": (
        "losses = self.log(losses)",
        "def log(self, losses):\n        print(losses['l1'].item())\n        return losses",
    ),
}  # fmt: skip
QUIET = {
    "weights": ("self.log(self.weights)", "def log(self, found):\n        print([v for v in found.values()])"),
    "a count": ("self.log(self.step)", 'def log(self, loss):\n        print(f"{loss:.3f}")'),
    "averaged": ('self.log(losses["loss"].item())', 'def log(self, loss):\n        print(f"{loss:.3f}")'),
    "not shown": ("self.log(losses)", "def log(self, losses):\n        self.last = losses"),
}
INLINE = {
    "a loop": "for k, v in losses.items():\n                print(k, v.item())",
    "a loop that shows them": 'for k, v in losses.items():\n                self.writer.add_scalar(k, v, 1)',
    "a dict": "print({k: round(v.item(), 4) for k, v in losses.items()})",
    "a dict with a name": "logs = {k: v.item() for k, v in losses.items()}\n            self.step += len(logs)",
    "a text": 'print(" ".join(f"{v:.4f}" for v in losses.values()))',
}  # fmt: skip


def told(script: str, hand: str, method: str) -> list[str]:
    result = convert_text(script.format(hand=hand, method=method))
    assert not result.error and b"OptimManager" in result.after
    return [said.message for said in result.reported if "is of this rank's share of the batch" in said.message]


@pytest.mark.parametrize(("hand", "method"), QUIET.values(), ids=QUIET.keys())
def test_what_is_no_loss_of_a_share_is_not_told(hand: str, method: str) -> None:
    assert told(ENTRY, hand, method) == []


LOGGER = "pass\n\n\nclass Logger:\n    def log(self, at, loss):\n        self.lines.add_scalar('loss', loss.item(), at)"


@pytest.mark.parametrize(
    ("hand", "count"),
    [
        ("loss = loss.item()\n            self.logger.log(1, loss)", 0),
        ("loss = loss.item()\n            if self.step:\n                self.logger.log(1, loss)", 0),
        ("if self.step:\n                loss = loss.item()\n            self.logger.log(1, loss)", 1),
        ("self.logger.log(1, loss)\n            loss = loss.item()", 1),
    ],
)
def test_a_number_that_takes_its_loss_s_name_is_whole(hand: str, count: int) -> None:
    assert len(told(TOTALS["added"], hand, LOGGER)) == count


@pytest.mark.parametrize(("hand", "method"), OTHERS.values(), ids=OTHERS.keys())
def test_a_method_that_does_more_is_told(hand: str, method: str) -> None:
    (message, *_) = told(ENTRY, hand, method)
    assert ".log" in message and "bmt.sum_loss(" in message


@pytest.mark.parametrize("key", ["num", "correct"])
def test_a_dict_with_counts_is_told(key: str) -> None:
    text = ENTRY.replace(
        "        return losses", f'        losses["{key}"] = torch.ones(()).sum()\n        return losses'
    )
    assert told(text, *SHOWING["a loop"])


def test_sums_are_told() -> None:
    text = ENTRY.replace("(out - y).abs().mean()", 'nn.functional.l1_loss(out, y, reduction="sum")')
    assert told(text, *SHOWING["a loop"])


@pytest.mark.parametrize("script", TOTALS.values(), ids=TOTALS.keys())
@pytest.mark.parametrize(("hand", "method"), SHOWING.values(), ids=SHOWING.keys())
def test_a_method_that_shows_losses_gets_those_of_all_ranks(hand: str, method: str, script: str) -> None:
    assert told(script, hand, method) == []
    assert "bmt.sum_loss(losses" in converted(script.format(hand=hand, method=method))


@pytest.mark.parametrize("hand", INLINE.values(), ids=INLINE.keys())
def test_a_loop_over_losses_goes_through_those_of_all_ranks(hand: str) -> None:
    after = converted(ENTRY.format(hand=hand, method="pass"))
    assert "in bmt.sum_loss(losses)." in after
    assert not any("share of" in said.message for said in convert_text(ENTRY.format(hand=hand, method="pass")).reported)


@pytest.mark.parametrize(
    ("hand", "method", "wanted"),
    [
        (
            'self.log({"loss": losses["loss"].item(), "part": (x - y).abs().mean()})',
            "def log(self, found):\n        for k, v in found.items():\n            print(k, float(v))",
            '"part": bmt.sum_loss((x - y).abs().mean())',
        ),
        (
            "self.log(n=len(x))",
            'def log(self, **found):\n        print(found["n"])',
            "self.log(n=bmt.total(len(x)))",
        ),
    ],
    ids=["a dict that is written out", "by name"],
)
def test_other_numbers_of_a_share(hand: str, method: str, wanted: str) -> None:
    assert wanted in converted(ENTRY.format(hand=hand, method=method).replace("{{", "{").replace("}}", "}"))
