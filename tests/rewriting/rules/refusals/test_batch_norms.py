"""Batch norms are reported once a file, also those of models that come from torchvision."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
import torchvision
from torchvision import models
from torchvision.models import resnet50

model = {model}
opt = torch.optim.SGD(model.parameters(), 0.1)
for x in torch.utils.data.DataLoader(data, batch_size=4):
    loss = model(x).mean()
    loss.backward()
    opt.step()
"""


def reported(model: str) -> list[int]:
    result = convert_text(SCRIPT.format(model=model))
    assert result.changed
    return [finding.line for finding in result.reported if "batch norm" in finding.message]


@pytest.mark.parametrize(
    "model",
    [
        "torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4))",
        "torchvision.models.resnet18()",
        "models.resnet18(weights=None)",
        "resnet50(num_classes=10)",
        "models.vgg11_bn()",
        "models.__dict__[arch]()",
    ],
)
def test_a_batch_norm_is_reported(model: str) -> None:
    assert reported(model) == [6]


@pytest.mark.parametrize("model", ["models.vit_b_16()", "models.vgg11()", "torch.nn.LayerNorm(4)"])
def test_other_models_have_none(model: str) -> None:
    assert reported(model) == []


BY_HAND = """import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))
        self.register_buffer("seen", torch.zeros(n))

    def forward(self, x):
        {read}
        {written}
        return (x - value) * self.scale


model = nn.Sequential(nn.Linear(4, 4), Norm(4))
opt = torch.optim.SGD(model.parameters(), 0.1)
for x in torch.utils.data.DataLoader(data, batch_size=4):
    loss = model(x).mean()
    loss.backward()
    opt.step()
"""
KEPT = {
    "a running mean": ("value = x.mean(0)", "self.seen.mul_(0.9).add_(value.data * 0.1)"),
    "of pictures": ("value = x.mean(dim=[0, 2, 3])", "self.seen = 0.9 * self.seen + 0.1 * value"),
    "a spread": ("value = torch.std(x, 0)", "self.seen.copy_(value)"),
    "a first batch": ("value = x.mean(dim=0, keepdim=True)", "self.scale.data.copy_(value)"),
    "a part": ("value = x.var((0, 2))", "self.seen[:] = value"),
}
ITEMS = {
    "of each item": ("value = x.mean(1)", "self.seen.copy_(value)"),
    "with nothing kept": ("value = x.mean(0)", "self.last = value"),
    "a count": ("value = 1", "self.seen += 1"),
}


def by_hand(read: str, written: str) -> list[int]:
    result = convert_text(BY_HAND.format(read=read, written=written))
    return [finding.line for finding in result.reported if "statistics of the batch" in finding.message]


@pytest.mark.parametrize(("read", "written"), KEPT.values(), ids=KEPT.keys())
def test_a_batch_norm_by_hand_is_reported(read: str, written: str) -> None:
    assert by_hand(read, written) == [12]


@pytest.mark.parametrize(("read", "written"), ITEMS.values(), ids=ITEMS.keys())
def test_other_layers_by_hand_are_not(read: str, written: str) -> None:
    assert by_hand(read, written) == []


SET_ONCE = """import torch
from torch import nn


class ActNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))
        self.register_buffer("done", torch.tensor(0))

    def start(self, x):
        with torch.no_grad():
            {read}
            {written}

    def forward(self, x):
        if self.done.item() == 0:
            {called}
            self.done.fill_(1)
        return x * self.scale


model = nn.Sequential(nn.Linear(4, 4), ActNorm(4))
opt = torch.optim.SGD(model.parameters(), 0.1)
for x in torch.utils.data.DataLoader(data, batch_size=4):
    loss = model(x).mean()
    loss.backward()
    opt.step()
"""
FIRST = {
    "over the batch": ("value = x.std(0)", "self.scale.data.copy_(value)"),
    "of turned values": ("flat = x.permute(1, 0).reshape(4, -1); value = flat.std(1)", "self.scale.data.copy_(value)"),
    "over all": ("value = x.std()", "self.scale.data.fill_(value)"),
    "of transposed values": ("value = x.transpose(0, 1).mean(1)", "self.scale.copy_(value)"),
    "assigned": ("value = torch.mean(x, dim=0)", "self.scale.data = value"),
}


def set_once(read: str, written: str, called: str = "self.start(x)") -> int:
    result = convert_text(SET_ONCE.format(read=read, written=written, called=called))
    return sum("statistics of the batch" in finding.message for finding in result.reported)


@pytest.mark.parametrize(("read", "written"), FIRST.values(), ids=FIRST.keys())
def test_parameters_that_the_first_batch_sets_are_reported(read: str, written: str) -> None:
    assert set_once(read, written) == 1


def test_other_methods_that_set_parameters_are_not() -> None:
    read, written = FIRST["over the batch"]
    assert set_once(read, written, "pass") == 0  # nothing calls it
    assert set_once("value = x.mean(1)", written) == 0
    assert set_once("value = torch.ones(4)", written) == 0
