"""A file that does not parse holds a project up where a script that is launched may import it, or where it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewriter.cli import main

TRAIN = """import torch
{imported}

model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for x in batches:
    model(x).mean().backward()
    opt.step()
"""
OLD = "def show(x):\n    print x\n"
NEEDED = {
    "imported": {"train.py": "import old"},
    "imported with others": {"train.py": "import os, old"},
    "from it": {"train.py": "from old import show"},
    "from a package": {"train.py": "from tools import old", "tools/__init__.py": ""},
    "by a file that is imported": {
        "train.py": "from tools import helper",
        "tools/helper.py": "from .old import show\n",
    },
    "by a package": {"train.py": "import tools", "tools/__init__.py": "from . import old\n"},
    "in a function": {"train.py": "def late():\n    from tools.old import show"},
    "by its name": {"train.py": "import importlib\n\nshow = importlib.import_module(args.kind)"},
    "by a star": {"train.py": "from tools import *", "tools/__init__.py": '__all__ = ["old"]\n'},
}
APART = {
    "nothing imports it": {"train.py": ""},
    "a word of another meaning": {"train.py": "old = 3"},
    "another script imports it": {"train.py": "", "plot.py": "import old\n"},
    "in a list of others": {"train.py": "import net", "net.py": '__all__ = ["older"]\n'},
    "a file of another name": {"train.py": "import older", "older.py": ""},
}


def last_lines(folder: Path, files: dict[str, str], old: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    (folder / "tools").mkdir()
    inside = any("tools" in path or "tools" in text for path, text in files.items())
    (folder / "tools" / "old.py" if inside else folder / "old.py").write_text(old)
    for path, text in files.items():
        (folder / path).write_text(TRAIN.format(imported=text) if path == "train.py" else text)
    assert main([str(folder), "--write"]) == 2
    shown = capsys.readouterr()
    assert "old.py:2: cannot parse" in shown.err
    return shown.out.splitlines()[-3:]


@pytest.mark.parametrize("files", NEEDED.values(), ids=NEEDED.keys())
def test_a_file_that_is_needed(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, _, last = last_lines(tmp_path, files, OLD, capsys)
    assert last.startswith("not ready to launch: ") and "old.py:2: cannot parse" in last
    assert summary.endswith("1 file not understood")


@pytest.mark.parametrize("files", APART.values(), ids=APART.keys())
def test_a_file_that_is_not(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, _, last = last_lines(tmp_path, files, OLD, capsys)
    assert not last.startswith("not ready") and last.endswith(f"torchrun --nproc_per_node=N {tmp_path / 'train.py'}")
    assert summary.endswith("1 file not understood, which nothing that is launched imports")


def test_a_file_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *_, last = last_lines(tmp_path, {"train.py": ""}, OLD + "    loss.backward()\n", capsys)
    assert last.startswith("not ready to launch: ")


def test_where_nothing_else_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text("import torch\n\n\nclass A(torch.nn.Module):\n    pass\n")
    (tmp_path / "old.py").write_text(OLD)
    assert main([str(tmp_path), "--write"]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("not ready to launch: ")


def notebook(code: str) -> str:
    cells = [{"cell_type": "code", "source": code, "metadata": {}, "outputs": [], "execution_count": None}]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.mark.parametrize("code", ["2 files are read", "2 files are read\nloss.backward()\n"])
@pytest.mark.parametrize("imported", ["", "import importlib\n\nshow = importlib.import_module(args.kind)"])
def test_a_notebook_beside_scripts(
    code: str, imported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(TRAIN.format(imported=imported))
    (tmp_path / "show.ipynb").write_text(notebook(code))
    assert main([str(tmp_path), "--write"]) == 2
    shown = capsys.readouterr()
    assert "show.ipynb:cell 1:1: cannot parse" in shown.err
    assert shown.out.splitlines()[-1].endswith(f"torchrun --nproc_per_node=N {tmp_path / 'train.py'}")


def test_a_notebook_that_is_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "show.ipynb").write_text(notebook("2 files are read\nloss.backward()\n"))
    assert main([str(tmp_path), "--write"]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("not ready to launch: ")
