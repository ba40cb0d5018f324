"""The losses of each item are rows of the batch, whatever their name is: no loss that ranks have a mean of."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader


class Table:
    def __init__(self):
        self.values, self.all = torch.zeros(64), []

    def set(self, index, values):
        self.values[index] = values

    def note(self, values):
        self.all.extend(values)


table = Table()
model = nn.Linear(4, 4)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
crit = nn.CrossEntropyLoss({options})
rows, total = [], 0.0
for x, y, index in DataLoader(data, batch_size=8):
    losses = {made}
    loss = losses.mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    {sink}
"""
FUNCTION, CRITERION = "F.cross_entropy(model(x), y, reduction='none')", "crit(model(x), y)"


def after(made: str, sink: str, options: str = "reduction='none'") -> tuple[str, list[str]]:
    result = convert_text(SCRIPT.format(made=made, sink=sink, options=options))
    told = [found.message for found in result.reported if "share of the data" in found.message]
    return result.after.decode().splitlines()[-1].strip(), told


def test_one_number_for_the_batch_stays_a_loss() -> None:
    line, _ = after(CRITERION, "rows.append(losses.item())", options="")
    assert line == "rows.append(bmt.sum_loss(losses).item())"


def test_what_becomes_one_number_stays_a_loss() -> None:
    line, _ = after(FUNCTION + "; losses = losses.mean()", "rows.append(losses.item())")
    assert line == "rows.append(bmt.sum_loss(losses).item())"


REPORTED = {
    "given to an object": "table.set(index, losses.detach())",
    "put at places": "table.values[index] = losses.detach()",
    "the largest": "print(losses.max().item())",
}


@pytest.mark.parametrize("made", [FUNCTION, CRITERION], ids=["function", "criterion"])
@pytest.mark.parametrize("sink", REPORTED.values(), ids=REPORTED)
def test_losses_at_places_are_reported(made: str, sink: str) -> None:
    line, told = after(made, sink)
    assert "sum_loss" not in line and "gather_samples" not in line and len(told) == 1


CONVERTED = {
    "a list": ("rows.extend(losses.tolist())", "rows.extend(bmt.gather_samples(losses.tolist()))"),
    "a tensor": ("rows.append(losses.detach())", "rows.append(bmt.gather_samples(losses.detach()))"),
    "an object's list": ("table.note(losses.tolist())", "table.note(bmt.gather_samples(losses.tolist()))"),
    "a sum": ("rows.append(losses.sum().item())", "rows.append(bmt.total(losses.sum().item()))"),
    "an added sum": ("total += losses.sum().item()", "total += bmt.total(losses.sum().item())"),
    "a mean": ("rows.append(losses.mean().item())", "rows.append(bmt.sum_loss(losses.mean().item()))"),
}


@pytest.mark.parametrize("made", [FUNCTION, CRITERION], ids=["function", "criterion"])
@pytest.mark.parametrize(("sink", "expected"), CONVERTED.values(), ids=CONVERTED)
def test_rows_sums_and_means_of_them_become_the_batchs(made: str, sink: str, expected: str) -> None:
    assert after(made, sink) == (expected, [])
