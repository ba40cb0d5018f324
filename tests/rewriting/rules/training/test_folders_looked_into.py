"""Where all ranks look into a folder that rank 0's writer makes, or puts files into, they wait for it."""

from __future__ import annotations

import pytest

from tests.rewriting.helpers import converted

SCRIPT = """import glob
import json
import os
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter


def main():
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    log_dir = os.path.join("runs", "a")
    {setup}
    for x in batches:
        net(x).mean().backward()
        optimizer.step()


main()
"""
WRITER = "writer = SummaryWriter(log_dir)"
NOT_LOOKED_INTO = {
    "nobody looks": WRITER,
    "before": f"names = os.listdir(log_dir)\n    {WRITER}",
    "another one": f'{WRITER}\n    names = os.listdir("data")',
    "no folder is named": "writer = SummaryWriter()\n    names = os.listdir(log_dir)",
    "rank 0 alone looks": f"{WRITER}\n    if bmt.rank() == 0:\n        names = os.listdir(log_dir)",
    "they wait already": f"{WRITER}\n    bmt.synchronize()\n    names = os.listdir(log_dir)",
}
LOOKED_INTO = {
    "listdir": f"{WRITER}\n    names = os.listdir(log_dir)",
    "scandir": f"{WRITER}\n    names = [entry.name for entry in os.scandir(log_dir)]",
    "walk": f"{WRITER}\n    for root, _, names in os.walk(log_dir):\n        print(root)",
    "glob": f'{WRITER}\n    found = glob.glob(os.path.join(log_dir, "*.pt"))',
    "glob by a text": f'{WRITER}\n    found = glob.glob(f"{{log_dir}}/*.pt")',
    "iterdir": "path = Path(log_dir)\n    writer = SummaryWriter(str(path))\n    names = list(path.iterdir())",
    "named as an argument": "writer = SummaryWriter(log_dir=log_dir)\n    names = os.listdir(log_dir)",
    "changed to": f"{WRITER}\n    os.chdir(log_dir)",
    "asserted": f"{WRITER}\n    assert os.path.isdir(log_dir)",
    "a file in it": """with open(os.path.join(log_dir, "a.json"), "w") as f:
        json.dump({}, f)
    names = os.listdir(log_dir)""",
}


def script(setup: str) -> str:
    text = SCRIPT.replace("{setup}", setup)
    return text.replace("import torch\n", "import torch\nimport bmtrain as bmt\n", 1) if "bmt." in setup else text


@pytest.mark.parametrize("setup", NOT_LOOKED_INTO.values(), ids=NOT_LOOKED_INTO.keys())
def test_nobody_waits_for_nothing(setup: str) -> None:
    assert converted(script(setup)).count("bmt.synchronize()") == setup.count("bmt.synchronize()")


@pytest.mark.parametrize("setup", LOOKED_INTO.values(), ids=LOOKED_INTO.keys())
def test_all_wait_for_the_folder(setup: str) -> None:
    lines = [line.strip() for line in converted(script(setup)).splitlines()]
    (waits,) = [number for number, line in enumerate(lines) if line == "bmt.synchronize()"]
    assert "SummaryWriter" in lines[waits - 1] or "json.dump" in lines[waits - 1]


def test_in_the_constructor_of_a_log() -> None:
    text = script("log = Log(log_dir)").replace(
        "def main",
        "class Log:\n    def __init__(self, folder):\n        self.writer = SummaryWriter(folder)\n"
        "        self.runs = len(os.listdir(folder))\n\n\ndef main",
    )
    made = "        self.writer = bmt.on_rank_0(SummaryWriter)(folder)\n        bmt.synchronize()\n"
    assert made in converted(text)
