"""Sums of samples that are compared with what is made of all in the batch are no sums of the ranks': reported."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.plan import Options

SCRIPT = """import torch
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
spread, kept = 0.0, []
for x, y in DataLoader(data, batch_size=8):
    out = net(x)
    loss = torch.nn.functional.mse_loss(out, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
{body}
print(spread, kept)
"""
COMPARED = {
    "centred": "((x - x.mean(0)) ** 2).sum()",
    "by keyword": "((x - x.mean(dim=0)) ** 2).sum()",
    "of torch": "torch.sum((x - torch.mean(x, 0)) ** 2)",
    "of all": "((y - y.mean()) ** 2).mean()",
    "turned round": "(y.mean() - y).abs().mean()",
    "to the largest": "(x / x.max()).mean()",
    "by a norm": "(x / x.norm()).sum()",
    "by a sum": "(y * out / y.sum()).sum()",
    "standardised": "((x - x.mean(0)) / x.std()).sum()",
    "in a product": "((y - y.mean()) * (out - out.mean())).sum()",
}
ALONE = {
    "an error": "((out - y) ** 2).sum()",
    "along a row": "((x - x.mean(1, keepdim=True)) ** 2).sum()",
    "the last": "((x - x.mean(-1, keepdim=True)) ** 2).mean()",
    "hits": "(out.round() == y).sum()",
    "weighed": "loss * x.size(0)",
    "scaled": "(out * 2 / 3).mean()",
}
PLACES = ["spread += {}", "kept.append({}.item())", "print({}.item())", "z = {}\n    spread += z.item()"]


def remarks(body: str) -> str:
    result = convert_text(SCRIPT.format(body=f"    {body}"), Options())
    assert not result.error
    return "\n".join(finding.message for finding in result.reported)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", COMPARED.values(), ids=COMPARED.keys())
def test_what_is_compared_is_reported(value: str, place: str) -> None:
    assert "this rank's share of the data" in remarks(place.format(value))


@pytest.mark.parametrize("value", COMPARED.values(), ids=COMPARED.keys())
def test_a_name_between_is_followed(value: str) -> None:
    inner, _, last = value.rpartition(".")
    if value.startswith("torch"):
        inner, last = "(x - torch.mean(x, 0)) ** 2", "sum()"
    assert "this rank's share of the data" in remarks(f"d = {inner}\n    spread += d.{last}")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", ALONE.values(), ids=ALONE.keys())
def test_what_each_sample_has_alone_is_not(value: str, place: str) -> None:
    assert "share of the data" not in remarks(place.format(f"({value})"))
