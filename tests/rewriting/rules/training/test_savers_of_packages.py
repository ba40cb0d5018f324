"""Objects of packages that save the model can do so on no number of ranks: the script stays, with the reason."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.types import Refusal

SCRIPT = """import torch
{imported}
from torch.utils.data import DataLoader

torch.manual_seed(3)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{made}
for epoch in range(2):
    for x, y in DataLoader(data, batch_size=4):
        loss = (model(x) - y).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    {saved}
"""
TIMM, ALL = "from timm.utils import CheckpointSaver", "from timm.utils import *"
MADE = "saver = CheckpointSaver(model=model, optimizer=optimizer)"
REFUSED = {
    "on every rank": (TIMM, MADE, "saver.save_checkpoint(epoch, metric=1.0)"),
    "by place": (TIMM, "saver = CheckpointSaver(model, optimizer)", "saver.save_checkpoint(epoch)"),
    "on one rank": (
        TIMM, f"saver = None\nif rank == 0:\n    {MADE}", "if saver is not None:\n        saver.save_checkpoint(epoch)",
    ),
    "by a star": (ALL, MADE, "best, at = saver.save_checkpoint(epoch, metric=1.0)"),
    "of a module": ("import timm", "saver = timm.utils.CheckpointSaver(model=model)", "saver.save_recovery(epoch)"),
    "another package": ("from ckpt import Keeper", "keeper = Keeper(model)", "keeper.save(epoch)"),
}  # fmt: skip
CONVERTED = {
    "without the model": (TIMM, "saver = CheckpointSaver(None, optimizer=None)", "saver.save_checkpoint(epoch)"),
    "other work": ("from ema import EMA", "ema = EMA(model)", "ema.update()"),
    "the model's own": ("from nets import Net", "", "torch.save(model.state_dict(), 'a.pt')"),
    "pictures": ("from plots import Plots", "plots = Plots(model)", "plots.save_images(x)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_script_with_such_a_saver_stays(name: str) -> None:
    imported, made, saved = REFUSED[name]
    text = SCRIPT.format(imported=imported, made=made, saved=saved)
    result = convert_text(text)
    assert result.after.decode() == text
    said = [finding.message for finding in result.reported if isinstance(finding, Refusal)]
    assert len(said) == 1 and "torch.save(model.state_dict(), path)" in said[0]


@pytest.mark.parametrize("name", CONVERTED)
def test_others_are_converted(name: str) -> None:
    imported, made, saved = CONVERTED[name]
    result = convert_text(SCRIPT.format(imported=imported, made=made, saved=saved))
    assert "bmt.init_distributed" in result.after.decode()
