# ruff: noqa: E501 - tables of code are easier to read on one line
"""Folders named by the time of their making: rank 0's name is everyone's."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from ...helpers import converted

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
    assert any("names this by the time" in finding.message for finding in result.reported)


NOW = 'datetime.now().strftime("%H")'
PARSER = "parser = argparse.ArgumentParser()\n"
PARSED = "args = parser.parse_args()\nos.makedirs(args.out, exist_ok=True)\n"
CLASS = "@dataclass\nclass Config:\n    lr: float = 0.1\n    out: str = {value}\n\n\ncfg = Config()\nos.makedirs(cfg.out, exist_ok=True)\n"
SETTINGS = {
    "an option": (f'{PARSER}parser.add_argument("--out", default={NOW})\n{PARSED}', "args.out"),
    "text": (f'{PARSER}parser.add_argument("--out", default=f"runs/{{time.time()}}")\n{PARSED}', "args.out"),
    "another name": (f'{PARSER}parser.add_argument("--run", dest="out", default={NOW})\n{PARSED}', "args.out"),
    "a value made before": (f'now = {NOW}\n{PARSER}parser.add_argument("-o", "--out", default="a" + now)\n{PARSED}', "args.out"),
    "defaults": (f'{PARSER}parser.add_argument("--out")\nparser.set_defaults(out={NOW})\n{PARSED}', "args.out"),
    "joined": (
        f'{PARSER}parser.add_argument("--run-name", default={NOW})\nargs = parser.parse_args()\nout = Path("a") / args.run_name\nout.mkdir()\n',
        "args.run_name",
    ),
    "a function's": (
        f'def options():\n    parser = argparse.ArgumentParser()\n    parser.add_argument("--out", default={NOW})\n    return parser.parse_args()\n\n\n{PARSED.replace("parser.parse_args", "options")}',
        "args.out",
    ),
    "a table": (
        f'{PARSER}parser.add_argument("--out", default={NOW})\nargs = vars(parser.parse_args())\nos.makedirs(args["out"], exist_ok=True)\n',
        'args["out"]',
    ),
    "handed on": (
        f'{PARSER}parser.add_argument("--out", default={NOW})\n\n\ndef prepare(opt):\n    os.makedirs(opt.out, exist_ok=True)\n\n\nargs = parser.parse_args()\nprepare(args)\n',
        "args.out",
    ),
    "held": (
        f'{PARSER}parser.add_argument("--out", default={NOW})\n\n\nclass Log:\n    def __init__(self, args):\n        self.args = args\n        os.makedirs(self.args.out, exist_ok=True)\n\n\nargs = parser.parse_args()\nLog(args)\n',
        "args.out",
    ),
    "a file that is read": (
        f'{PARSER}parser.add_argument("--out", default={NOW})\nargs = parser.parse_args()\ntorch.load(args.out)\n',
        "args.out",
    ),
    "a field": (CLASS.format(value=NOW), "cfg.out"),
    "a field's factory": (CLASS.format(value=f"field(default_factory=lambda: {NOW})"), "cfg.out"),
    "a field's function": (f"def name():\n    return {NOW}\n\n\n" + CLASS.format(value="field(default_factory=name)"), "cfg.out"),
    "a class's": (f"class Config:\n    out = {NOW}\n\n\nos.makedirs(Config.out, exist_ok=True)\n", "Config.out"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "access"), SETTINGS.values(), ids=SETTINGS.keys())
def test_an_option_that_is_the_time_is_rank_0s(text: str, access: str) -> None:
    after = converted(HEAD.replace("args = argparse.ArgumentParser().parse_args()\n", "") + text + TRAIN)
    assert f"bmt.init_distributed()\n{access} = {SHARED}({access})\n" in after and after.count(SHARED) == 1


def test_the_seed_is_still_what_starts_the_ranks() -> None:
    text = (
        f'def main():\n    parser = argparse.ArgumentParser()\n    parser.add_argument("--seed", type=int)\n    parser.add_argument("--out", default={NOW})\n'
        "    args = parser.parse_args()\n    torch.manual_seed(args.seed)\n    os.makedirs(args.out, exist_ok=True)\n    "
        + TRAIN.replace("\n", "\n    ")
        + "\n\nmain()\n"
    )
    after = converted(HEAD.replace("args = argparse.ArgumentParser().parse_args()\n", "") + text)
    assert f"    bmt.init_distributed(seed=args.seed)\n    args.out = {SHARED}(args.out)\n" in after


def test_an_option_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text(
        f'import argparse\nfrom datetime import datetime\n\n\ndef options():\n    {PARSER}    parser.add_argument("--out", default={NOW})\n    return parser.parse_args()\n'
    )
    text = "from conf import options\n{head}args = options()\nos.makedirs(args.out, exist_ok=True)\n{train}"
    head = HEAD.replace("args = argparse.ArgumentParser().parse_args()\n", "")
    (tmp_path / "train.py").write_text(text.format(head=head, train=TRAIN))
    results = convert_paths([tmp_path / "conf.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert f"args.out = {SHARED}(args.out)\n" in results[1].after.decode()


SETTINGS_KEPT = {
    "no time": f'{PARSER}parser.add_argument("--out", default="runs")\n{PARSED}',
    "another option": f'{PARSER}parser.add_argument("--note", default={NOW})\nparser.add_argument("--out", default="runs")\n{PARSED}',
    "what cannot be set": CLASS.replace("@dataclass", "@dataclass(frozen=True)").format(value=NOW),
}


@pytest.mark.parametrize("text", SETTINGS_KEPT.values(), ids=SETTINGS_KEPT.keys())
def test_other_options_stay(text: str) -> None:
    result = convert_text(HEAD + text + TRAIN)
    assert SHARED not in result.after.decode()
    assert any("named" in f.message or "names" in f.message for f in result.reported) is ("frozen" in text)
