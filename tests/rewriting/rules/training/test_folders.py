"""Folders made by all ranks: nobody fails because another was first; what is right already stays."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = "import os\nimport torch\nfrom pathlib import Path\n\nnet = torch.nn.Linear(4, 1)\n"
TRAIN = """opt = torch.optim.Adam(net.parameters())
loss = net(x).mean()
loss.backward()
opt.step()
"""

ASKED = {
    "os": ('if not os.path.exists("runs"):\n    os.makedirs("runs")\n', 'os.makedirs("runs", exist_ok=True)'),
    "isdir": ("if not os.path.isdir(d):\n    os.makedirs(d)\n", "os.makedirs(d, exist_ok=True)"),
    "mkdir": ("if not os.path.exists(d):\n    os.mkdir(d)\n", "os.makedirs(d, exist_ok=True)"),
    "path": ("if not d.exists():\n    d.mkdir()\n", "d.mkdir(exist_ok=True)"),
    "parents": ("if not d.is_dir():\n    d.mkdir(parents=True)\n", "d.mkdir(parents=True, exist_ok=True)"),
    "not there": ("if os.path.exists(d) == False:\n    os.makedirs(d)\n", "os.makedirs(d, exist_ok=True)"),
    "else": ("if os.path.exists(d):\n    y = 1\nelse:\n    os.makedirs(d)\n", "os.makedirs(d, exist_ok=True)"),
    "and": ("if save and not os.path.exists(d):\n    os.makedirs(d)\n", "os.makedirs(d, exist_ok=True)"),
    "mode": ("if not os.path.exists(d):\n    os.makedirs(d, 0o755)\n", "os.makedirs(d, 0o755, exist_ok=True)"),
    "said to fail": ("if not d.exists():\n    d.mkdir(exist_ok=False)\n", "d.mkdir(exist_ok=True)"),
    "one line": (
        "if not os.path.exists(d): os.makedirs(d)\n",
        "if not os.path.exists(d): os.makedirs(d, exist_ok=True)",
    ),
    "expression": ("None if os.path.exists(d) else os.makedirs(d)\n", "else os.makedirs(d, exist_ok=True)"),
    "leaves before": (
        "def make(d):\n    if os.path.exists(d):\n        return\n    os.makedirs(d)\nmake(d)\n",
        "    os.makedirs(d, exist_ok=True)",
    ),
    "in a function": (
        "def make(d):\n    for e in d:\n        if not os.path.exists(e):\n            os.makedirs(e)\nmake(d)\n",
        "os.makedirs(e, exist_ok=True)",
    ),
}


@pytest.mark.parametrize(("text", "wanted"), ASKED.values(), ids=ASKED.keys())
def test_a_folder_that_is_asked_for_may_be_there(text: str, wanted: str) -> None:
    after = converted(HEAD + text + TRAIN)
    assert wanted in after and "synchronize" not in after


def test_mkdir_imported_by_name() -> None:
    after = converted("from os import mkdir, path\n" + HEAD + "if not path.exists(d):\n    mkdir(d)\n" + TRAIN)
    assert "exist_ok=True" in after or "bmt.rank()" in after


ALONE = ['os.makedirs("runs")', "os.mkdir(d)", "d.mkdir()", "(d / 'a').mkdir(parents=True)", "Path('runs').mkdir()"]


@pytest.mark.parametrize("call", ALONE)
def test_one_rank_makes_it_where_nothing_asks(call: str) -> None:
    wanted = f"if bmt.rank() == 0:\n    {call}\nbmt.synchronize()\n"
    assert wanted in converted(HEAD + call + "\n" + TRAIN)
    first = converted(HEAD.replace("net =", f"{call}\nnet =") + TRAIN)
    assert f"bmt.init_distributed()\n{wanted}" in first


KEPT = [
    "os.makedirs(d, exist_ok=True)",
    "d.mkdir(parents=True, exist_ok=True)",
    "fs.mkdir(d)",
    "try:\n    os.makedirs(d)\nexcept FileExistsError:\n    pass",
    "try:\n    os.mkdir(d)\nexcept OSError as error:\n    y = error",
    "if rank == 0:\n    os.makedirs(d)",
    "if rank == 0 and not os.path.exists(d):\n    os.makedirs(d)",
    "os.makedirs(*d)",
    "d.mkdir(**options)",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_right_stays(text: str) -> None:
    assert f"\n{text}\n" in converted(f"{HEAD}{text}\n{TRAIN}")


def test_where_others_may_come_too_a_folder_may_be_there_on_several_ranks() -> None:
    wanted = "exist_ok=bmt.world_size() > 1)"
    assert f"os.makedirs(d, {wanted}" in converted(HEAD + "for d in ds:\n    os.makedirs(d)\n" + TRAIN)
    log = "class Log:\n    def __init__(self, d):\n        d.mkdir(parents=True)\n"
    assert f"d.mkdir(parents=True, {wanted}" in converted(HEAD + log + TRAIN)


@pytest.mark.parametrize(
    "text",
    [
        "for d in ds:\n    while os.path.exists(d):\n        d += '1'\n    os.makedirs(d)\n",
        "if os.path.exists(d):\n    raise ValueError(d)\nos.makedirs(d)\n",
    ],
)
def test_what_one_rank_must_decide_is_reported(text: str) -> None:
    result = convert_text(HEAD + text + TRAIN)
    assert any(finding.code == "BMT038" for finding in result.reported)


@pytest.mark.parametrize(
    "text",
    [
        "while os.path.exists(d):\n    d += '1'\nos.makedirs(d)\n",
        "if d:\n    while os.path.exists(d):\n        d += '1'\n    os.mkdir(d)\n",
        "while Path(d).is_dir():\n    d += '1'\nPath(d).mkdir()\n",
    ],
)
def test_a_name_that_is_counted_up_is_the_one_that_rank_0_finds(text: str) -> None:
    result = convert_text(HEAD + text + TRAIN)
    after = result.after.decode()
    assert "while bmt.agree(" in after and after.index("bmt.init_distributed(") < after.index("bmt.agree(")
    assert not [finding for finding in result.reported if finding.code == "BMT038"]
    assert convert_text(after).after.decode() == after


@pytest.mark.parametrize("given", ["there", "self.there", "flags['there']"])
@pytest.mark.parametrize("call", ["os.makedirs(path, exist_ok={})", "path.mkdir(parents=True, exist_ok={})"])
def test_a_choice_of_the_scripts_own_holds_on_one_rank(call: str, given: str) -> None:
    made = call.format(given)
    text = f"""import os
import torch

class Run:
    def __init__(self, path, there, flags):
        {made}

Run(path, there, flags)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = model(x).mean()
loss.backward()
optimizer.step()
"""
    assert f"exist_ok={given} or bmt.world_size() > 1" in converted(text)
