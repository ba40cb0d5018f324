# ruff: noqa: E501 - tables of code are easier to read on one line
"""What torchrun has told its processes is not overwritten by a script, however the script sets it."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from ...helpers import converted

NAMES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "FAST")
TRAINS = """
net = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
net(torch.ones(2, 2)).sum().backward()
optimizer.step()
"""
TOLD = {"MASTER_ADDR": "far", "MASTER_PORT": "9", "RANK": "5", "WORLD_SIZE": "8", "FAST": "old"}
SETS = {
    "a tuple": 'os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "here", "1"',
    "a list": '[os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["FAST"]] = "0", "1", "new"',
    "a function": 'def place():\n    return "here", "1"\n\n\nos.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place()',
    "a tuple in a tuple": 'a, (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) = 1, ("here", "1")',
    "one value": 'os.environ["RANK"] = os.environ["WORLD_SIZE"] = "1"',
    "a value that is kept": 'os.environ["RANK"] = rank = "0"',
    "on the line of a test": 'if True: os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "here", "1"',
    "a table": 'os.environ.update({"MASTER_ADDR": "here", "MASTER_PORT": "1", "FAST": "new"})',
    "keywords": 'os.environ.update(MASTER_ADDR="here", MASTER_PORT="1", FAST="new")',
    "a table of keywords": 'os.environ.update(dict(MASTER_ADDR="here", FAST="new"))',
    "a table before": 'given = {"MASTER_ADDR": "here", "FAST": "new"}\nos.environ.update(given)',
    "pairs": 'os.environ.update([("MASTER_ADDR", "here"), ("FAST", "new")])',
    "an operator": 'os.environ |= {"MASTER_ADDR": "here", "FAST": "new"}',
    "a loop": 'for key, value in {"MASTER_ADDR": "here", "FAST": "new"}.items():\n    os.environ[key] = value',
    "a loop over names": 'for key in ("RANK", "FAST"):\n    os.environ[key] = str(7)',
    "a function's arguments": 'def put(name, value):\n    os.environ[name] = str(value)\n\n\nput("MASTER_PORT", 1)\nput("FAST", "new")',
    "a name": 'KEY = "MASTER_PORT"\nos.environ[KEY] = "1"',
    "another launcher's": 'os.environ["SLURM"] = "3"\nos.environ.update(RANK=os.environ["SLURM"])',
    "environ": 'from os import environ\nenviron["MASTER_ADDR"], environ["MASTER_PORT"] = "here", "1"',
}  # fmt: skip
KEPT = {
    "a default": 'os.environ.setdefault("MASTER_PORT", "1")',
    "another variable": 'os.environ["FAST"], other = "new", 1',
    "another's table": 'given = {}\ngiven.update({"RANK": "1"})',
    "a table of others": 'os.environ.update({"FAST": "new"})',
    "any name": 'for key in ("FAST", "SLOW"):\n    os.environ[key] = os.environ.get("RANK", "1")',
    "read": 'rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]',
}  # fmt: skip


def left_by(code: str, told: dict[str, str]) -> dict[str, str | None]:
    """What is in the environment behind some code."""
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    with patch.dict(os.environ, {**others, **told}, clear=True):
        exec(code, {"os": os, "environ": os.environ})
        return {name: os.environ.get(name) for name in NAMES}


@pytest.mark.parametrize("name", KEPT)
def test_other_lines_stay(name: str) -> None:
    assert KEPT[name] in converted("import os\nimport torch\n\n" + KEPT[name] + TRAINS)


@pytest.mark.parametrize("name", SETS)
def test_what_torchrun_says_is_taken(name: str) -> None:
    after = converted("import os\nimport torch\n\n" + SETS[name] + TRAINS)
    code = after[after.index("\n", after.index("import bmtrain")) : after.index("bmt.init_distributed")]
    alone = left_by(SETS[name], {})
    assert left_by(code, {}) == alone
    told = left_by(code, TOLD)
    assert told == {**TOLD, "FAST": "new" if alone["FAST"] == "new" else told["FAST"]}
    assert told["FAST"] == left_by(SETS[name], TOLD)["FAST"]


def test_a_function_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "ready.py").write_text("import os\n\n\ndef put(key, value):\n    os.environ[key] = value\n")
    (tmp_path / "train.py").write_text(
        'import torch\nfrom ready import put\n\nput("MASTER_PORT", "1")\n' + TRAINS
    )  # fmt: skip
    paths = [tmp_path / "ready.py", tmp_path / "train.py"]
    after = {item.path.name: item.after.decode() for item in convert_paths(paths, Options())}
    assert "os.environ.get(key, value) if key in" in after["ready.py"]


def test_one_message_a_line() -> None:
    result = convert_text("import os\nimport torch\n\n" + SETS["a tuple"] + TRAINS)
    assert [finding.line for finding in result.applied if finding.code == "BMT040"] == [4]


ASKED = {
    "handed on": ("args.local_rank = env_local_rank", False),
    "handed on and more": ("args.local_rank = env_local_rank\n    args.fast = True", True),
    "something else": ("args.local_rank = 0", True),
    "otherwise": ("args.local_rank = env_local_rank\nelse:\n    args.alone = True", True),
}


@pytest.mark.parametrize(("body", "told"), ASKED.values(), ids=ASKED.keys())
def test_a_rank_that_only_gets_another_name_is_not_reported(body: str, told: bool) -> None:
    text = f"""import os
import torch

env_local_rank = int(os.environ.get("LOCAL_RANK", -1))
if env_local_rank != -1 and env_local_rank != args.local_rank:
    {body}
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x in torch.utils.data.DataLoader(data, batch_size=8):
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
"""
    found = [f for f in convert_text(text).reported if "has the other answer under torchrun" in f.message]
    assert bool(found) == told
