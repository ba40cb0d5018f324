"""Optimizers that are stepped as items of a list have no names for managers; what is missing is said."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch
from torch.utils.data import DataLoader


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 1)


net = Net()
a = torch.optim.Adam([net.fc.weight])
b = torch.optim.SGD([net.fc.bias], 0.1)
"""
LOOP = """for x, y in DataLoader(data, batch_size=8):
    loss = torch.nn.functional.mse_loss(net(x), y)
    net.zero_grad()
    loss.backward()
    {step}
"""
WORDS = "is one optimizer of several, of which each needs a name of its own"


@pytest.mark.parametrize(
    ("made", "step"),
    [
        ("many = [a, b]", "many[0].step(); many[1].step()"),
        ("many = (a, b)", "for o in many: o.step()"),
        ("many = [a, b]", "[o.step() for o in many]"),
        ("many = {'a': a, 'b': b}", "many['a'].step(); many['b'].step()"),
        ("many = [torch.optim.Adam([net.fc.weight]), torch.optim.SGD([net.fc.bias], 0.1)]", "many[0].step()"),
    ],
)
def test_steps_of_items(made: str, step: str) -> None:
    result = convert_text(f"{HEAD}{made}\n{LOOP.format(step=step)}")
    assert not result.changed and [WORDS in finding.message for finding in result.reported] == [True]


@pytest.mark.parametrize(
    "step",
    [
        "a.step(); b.step()",
        "a.step(); b.step()\n    [s.step() for s in schedules]",
        "a.step(); b.step()\n    for s in schedules: s.step()",
        "a.step(); b.step(); schedules[0].step()",
    ],
)
def test_names_of_their_own_and_schedules(step: str) -> None:
    schedules = "schedules = [torch.optim.lr_scheduler.StepLR(a, 1), torch.optim.lr_scheduler.StepLR(b, 1)]\n"
    result = convert_text(f"{HEAD}{schedules}{LOOP.format(step=step)}")
    assert result.changed and b"a_manager.step(); b_manager.step()" in result.after and not result.reported


def test_a_closure_is_refused_with_what_to_write() -> None:
    (found,) = convert_text(f"{HEAD}{LOOP.format(step='a.step(closure)')}").reported
    assert "loss = closure(), and step without it" in found.message
