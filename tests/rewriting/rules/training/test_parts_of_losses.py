"""Losses made of parts that a function gives, or that are named together: shown, and added up."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 2)
opt = torch.optim.Adam(net.parameters())
loader = DataLoader(data, batch_size=8)


def means(out, y):
    a = F.cross_entropy(out, y)
    b = out.pow(2).mean()
    return a, b


def sums(out, y):
    a = F.mse_loss(out, y, reduction="sum")
    b = -0.5 * torch.sum(out.exp())
    return a, b


def whole(out, y):
    a, b = sums(out, y)
    return a + b, a, b


class Loss(torch.nn.Module):
    def forward(self, out, y):
        a, b = means(out, y)
        return a + b, {"a": a.item(), "b": b.item()}


crit = Loss()
for step, (x, y) in enumerate(loader):
    out = net(x)
"""
STEP = "    opt.zero_grad()\n    loss.backward()\n    opt.step()\n"
MEANS, SUMS = "a, b = means(out, y)\n    loss = a + b", "a, b = sums(out, y)\n    loss = a + b"
MADE = "a = torch.nn.NLLLoss()(F.log_softmax(out, -1), y)\n    b = torch.nn.MSELoss()(out, y)\n    loss = a + b"
LITERAL = "a, b = F.mse_loss(out, y, reduction='sum'), out.sum()\n    loss = a + 0.5 * b"
SHOWN = {
    "means added up": (MEANS, "t += a.item()", "t += bmt.sum_loss(a"),
    "means shown": (MEANS, "print(a.item(), b.item())", "bmt.sum_loss(b"),
    "means of losses that are made there": (MADE, "t += a.item()", "t += bmt.sum_loss(a"),
    "sums added up": (SUMS, "t += b.item()", "t += bmt.total(b.item())"),
    "sums shown": (SUMS, "print(a.item(), b.item())", "bmt.print_rank(bmt.total(a.item()), bmt.total(b.item()))"),
    "named together": (LITERAL, "print(b.item())", "bmt.total(b.item())"),
    "beside their sum": ("loss, a, b = whole(out, y)", "print(f'{a.item():.3f}')", "{bmt.total(a.item()):.3f}"),
    "one beside": ("loss, a, _ = whole(out, y)", "writer.add_scalar('a', a.item(), 1)", "bmt.total(a.item())"),
    "by index": ("p = sums(out, y)\n    loss = p[0] + p[1]", "print(p[0].item())", "bmt.total(p[0].item())"),
    "means by index": ("p = means(out, y)\n    loss = p[0] + p[1]", "print(p[1].item())", "bmt.sum_loss(p[1]"),
    "each of its kind": (LITERAL.replace("out.sum()", "out.mean()"), "print(a.item())", "bmt.total(a.item())"),
}


@pytest.mark.parametrize(("made", "shown", "wanted"), SHOWN.values(), ids=SHOWN.keys())
def test_a_part_that_is_shown_is_the_batchs(made: str, shown: str, wanted: str) -> None:
    after = convert_text(f"{HEAD}    {made}\n{STEP}    {shown}\n").after.decode()
    assert wanted in after.partition("for step")[2]


@pytest.mark.parametrize("made", [SUMS, LITERAL, "p = sums(out, y)\n    loss = p[0] + p[1]"])
def test_a_sum_of_sums_is_the_whole_batchs(made: str) -> None:
    after = convert_text(f"{HEAD}    {made}\n{STEP}").after.decode()
    assert "backward(loss * bmt.world_size())" in after


@pytest.mark.parametrize(
    "shown", ["print(logs['a'])", "print(f'{logs[\"b\"]:.2f}')", "writer.add_scalar('a', logs['a'])"]
)
def test_what_a_loss_keeps_in_a_dict_is_reported(shown: str) -> None:
    result = convert_text(f"{HEAD}    loss, logs = crit(out, y)\n{STEP}    {shown}\n")
    assert "BMT037" in {finding.code for finding in result.reported}
