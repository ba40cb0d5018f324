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
