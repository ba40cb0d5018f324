"""Models in files that a script imports by names it makes: what is said of models is said of them, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.cli import main

NET = """import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)

    def forward(self, x):
        best = torch.topk(torch.fft.rfft(x, dim=1).abs().mean(0), 2)[1]
        return self.norm(self.inner(x)) / (1 + best.sum())
"""
TRAIN = """import importlib

import torch
from torch.utils.data import DataLoader, TensorDataset

{find}
loader = DataLoader(TensorDataset(torch.randn(32, 8)), batch_size=8, shuffle=True)
model = module.Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for (x,) in loader:
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
NAMES = {
    "formatted": 'module = importlib.import_module(f"nets.{args.name}")',
    "added": 'module = importlib.import_module("nets." + args.name)',
    "by format": 'module = importlib.import_module("{}.{}".format("nets", args.name))',
    "in a text for format": 'module = importlib.import_module("nets.{}".format(args.name))',
    "in a text for %": 'module = importlib.import_module("nets.%s" % args.name)',
    "relative": 'module = importlib.import_module("." + args.name, "nets")',
    "from a table": 'TABLE = {"net": "nets.net"}\nmodule = importlib.import_module(TABLE[args.name])',
    "from the folder": (
        'import os\n\nfound = [name[:-3] for name in os.listdir("nets") if name.endswith(".py")]\n'
        'module = importlib.import_module(".".join(("nets", found[0])))'
    ),
    "a path": 'module = importlib.import_module("./nets/net.py".removeprefix("./")[:-3].replace("/", "."), "nets")',
    "whole": 'module = importlib.import_module("nets.net")',
    "by its own name": 'from importlib import import_module\n\nmodule = import_module(f"nets.{args.name}")',
}


def said(find: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (folder / "nets").mkdir()
    (folder / "nets" / "__init__.py").touch()
    (folder / "nets" / "net.py").write_text(NET)
    (folder / "train.py").write_text(TRAIN.format(find=find))
    main([str(folder), "--write"])
    shown = capsys.readouterr()
    assert "train.py" in shown.out.splitlines()[-1]
    return shown.out + shown.err


@pytest.mark.parametrize("find", ["module = args.module", 'module = args.modules["nets"]'])
def test_what_no_name_leads_to_is_no_part_of_the_script(
    find: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(find, tmp_path, capsys)
    assert "batch norm sees" not in text and "chooses together" not in text


@pytest.mark.parametrize("find", NAMES.values(), ids=NAMES.keys())
def test_models_that_are_found_by_name(find: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(find, tmp_path, capsys)
    assert "net.py:7: BMT091" in text and "batch norm sees a rank's share" in text
    assert "net.py:10: BMT091" in text and "a batch chooses together" in text
