# ruff: noqa: E501 - tables of code are easier to read on one line
"""Folders named by the time of their making: rank 0's name is everyone's."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from .helpers import converted

HEAD = """import argparse
import os
import time
import uuid
from datetime import datetime
from pathlib import Path
import torch

args = argparse.ArgumentParser().parse_args()
"""
TRAIN = """net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
loss = net(x).mean()
loss.backward()
opt.step()
"""
SHARED = "bmt.store.broadcast_object"
MADE = {
    "a name": (
        'now = datetime.now().strftime("%H%M%S")\nrun = os.path.join("runs", now)\nos.makedirs(run, exist_ok=True)\n',
        f'bmt.init_distributed()\nnow = {SHARED}(datetime.now().strftime("%H%M%S"))\n',
    ),
    "asked for": (
        'run = "runs/" + time.strftime("%H%M%S")\nif not os.path.exists(run):\n    os.makedirs(run)\n',
        f'run = {SHARED}("runs/" + time.strftime("%H%M%S"))\n',
    ),
    "a path": (
        'run = Path("runs") / f"{datetime.now():%H}"\nrun.mkdir(parents=True)\n',
        f'run = {SHARED}(Path("runs") / f"{{datetime.now():%H}}")\n',
    ),
    "an option": (
        'args.save = "{}-{}".format(args.save, time.strftime("%H%M%S"))\nos.mkdir(args.save)\n',
        f'args.save = {SHARED}("{{}}-{{}}".format(args.save, time.strftime("%H%M%S")))\n',
    ),
    "in place": (
        'os.makedirs(f"runs/{int(time.time())}", exist_ok=True)\n',
        f'os.makedirs({SHARED}(f"runs/{{int(time.time())}}"), exist_ok=True)\n',
    ),
    "chance": ("run = uuid.uuid4().hex\nos.makedirs(run)\n", f"run = {SHARED}(uuid.uuid4().hex)\n"),
    "of an option": (
        "if args.name is None:\n    args.name = str(int(time.time()))\nos.makedirs(args.name, exist_ok=True)\n",
        f"    args.name = {SHARED}(str(int(time.time())))\n",
    ),
    "by percent": (
        'run = "runs/%s" % datetime.now().isoformat()\nos.makedirs(run)\n',
        f'run = {SHARED}("runs/%s" % datetime.now().isoformat())\n',
    ),
    "a function's": (
        'def name():\n    return "runs/" + time.strftime("%H")\n\n\nrun = name()\nos.makedirs(run, exist_ok=True)\n',
        f"run = {SHARED}(run)\nos.makedirs(run, exist_ok=True)\n",
    ),
    "a function's, asked for": (
        'def name():\n    return "runs/" + time.strftime("%H")\n\n\nrun = name()\nif not os.path.exists(run):\n    os.makedirs(run)\n',
        f"run = {SHARED}(run)\nif not os.path.exists(run):\n",
    ),
}


@pytest.mark.parametrize(("text", "wanted"), MADE.values(), ids=MADE.keys())
def test_rank_0s_name_is_everyones(text: str, wanted: str) -> None:
    after = converted(HEAD + text + TRAIN)
    assert wanted in after and after.count(SHARED) == 1
    assert after.index("bmt.init_distributed(") < after.index(SHARED)


def test_a_time_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text("import time\n\nNOW = time.strftime('%H')\n")
    text = 'import conf\n{head}run = os.path.join("runs", conf.NOW)\nif not os.path.exists(run):\n    os.makedirs(run)\n{train}'
    (tmp_path / "train.py").write_text(text.format(head=HEAD, train=TRAIN))
    results = convert_paths([tmp_path / "conf.py", tmp_path / "train.py"], Options(), [tmp_path])
    after = results[1].after.decode()
    assert f"bmt.init_distributed()\nrun = {SHARED}(run)\nif not os.path.exists(run):\n" in after


def test_a_time_imported_by_name(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text("import time\n\nNOW = time.strftime('%H')\n")
    text = "from conf import NOW\n{head}os.makedirs(os.path.join('runs', NOW), exist_ok=True)\n{train}"
    (tmp_path / "train.py").write_text(text.format(head=HEAD, train=TRAIN))
    results = convert_paths([tmp_path / "conf.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert f"os.makedirs({SHARED}(os.path.join('runs', NOW)), exist_ok=True)" in results[1].after.decode()


KEPT = {
    "no time": 'run = os.path.join("runs", args.name)\nos.makedirs(run, exist_ok=True)\n',
    "another time": 'start = time.time()\nos.makedirs("runs", exist_ok=True)\nprint(time.time() - start)\n',
    "one rank's": 'if rank == 0:\n    os.makedirs("runs/" + time.strftime("%H"))\n',
    "a date that is given": 'run = time.strftime("%H", args.date)\nos.makedirs(run, exist_ok=True)\n',
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT.keys())
def test_other_folders_keep_their_names(text: str) -> None:
    assert SHARED not in converted(HEAD + text + TRAIN)


REPORTED = {
    "a function's own": 'def make():\n    run = "runs/" + time.strftime("%H")\n    os.makedirs(run)\n    return run\n\n\nmake()\n',
    "a class's": 'class Log:\n    def __init__(self):\n        self.run = time.strftime("%H")\n        os.makedirs(self.run)\n\n\nLog()\n',
}


@pytest.mark.parametrize("text", REPORTED.values(), ids=REPORTED.keys())
def test_a_folder_that_ranks_may_not_make_together_is_reported(text: str) -> None:
    result = convert_text(HEAD + text + TRAIN)
    assert SHARED not in result.after.decode()
    assert any("named by the time" in finding.message for finding in result.reported)
