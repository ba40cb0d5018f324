# ruff: noqa: E501 - tables of code are easier to read on one line
"""What a script does beside making a folder is done where another rank has made it a moment before, too."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted, printed

SCRIPT = """import json
import os
import torch
from pathlib import Path
from torch.utils.data import DataLoader, TensorDataset

RANK = int(os.environ["RANK"])


{function}net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
out = "runs/now"
{made}
for (x,) in DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4):
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
MORE = {
    "a line": "if not os.path.exists(out):\n    print('made', out)\n    os.makedirs(out)",
    "a file": "if not os.path.exists(out):\n    os.makedirs(out)\n    with open(os.path.join(out, 'a.json'), 'w') as f:\n        json.dump(1, f)",
    "a path": "if not Path(out).exists():\n    Path(out).mkdir(parents=True)\n    print('made', out)",
    "false": "if os.path.isdir(out) is False:\n    os.makedirs(out)\n    print('made', out)",
}
ALONE = {
    "the folder": "if not os.path.exists(out):\n    os.makedirs(out)",
    "two": "if not os.path.exists(out):\n    os.makedirs(out)\n    os.makedirs(os.path.join(out, 'b'))",
    "its mode": "if not os.path.exists(out):\n    os.makedirs(out)\n    os.chmod(out, 0o775)",
}


@pytest.mark.parametrize("name", ALONE)
def test_a_folder_alone_is_made_without_a_word(name: str) -> None:
    assert "agree" not in converted(SCRIPT.format(function="", made=ALONE[name]))


def test_where_not_all_ranks_come_it_is_reported() -> None:
    made = f"if RANK % 2:\n    {MORE['a line']}".replace("\n    ", "\n        ")
    result = convert_text(SCRIPT.format(function="", made=made.replace("\n        if", "\n    if")))
    assert any("another rank may just have made this folder" in said.message for said in result.reported)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("inside", [False, True])
def test_rank_0_decides(name: str, inside: bool, tmp_path: Path) -> None:
    made, function = MORE[name], ""
    if inside:
        body = "\n".join(f"    {line}" for line in made.splitlines())
        function, made = f"def prepare(out):\n{body}\n\n\n", "prepare(out)"
    after = converted(SCRIPT.format(function=function, made=made))
    assert after.count("bmt.agree(") == 1
    lines, _ = run_ranks(2, _play, after, str(tmp_path))
    assert lines == ([] if name == "a file" else ["made runs/now"])
    assert (tmp_path / "runs/now").is_dir() and (name != "a file" or (tmp_path / "runs/now/a.json").exists())


def _play(text: str, folder: str) -> list[str]:
    os.chdir(folder)
    if os.environ["RANK"] == "0":
        time.sleep(0.3)
    return printed(re.sub(r"bmt\.init_distributed\(.*\)", "torch.manual_seed(1)", text))
