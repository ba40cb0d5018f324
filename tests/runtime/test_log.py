"""What the runtime says goes to stderr, or where a script puts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_script

from bmtrain import doctor, plot
from bmtrain.checkpoint import command as checkpoint
from bmtrain.estimate import command as estimate

SAY = "from bmtrain.log import say; say('two units'); say('three', rank=1)"
SAID = "bmtrain: two units\nbmtrain: three\n"
OWN = """
import logging, sys
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("%(name)s %(rank)s %(message)s"))
logging.getLogger("bmtrain").addHandler(handler)
"""


BAR = "import tqdm, sys; bar = tqdm.tqdm(total=3, ncols=40, mininterval=0); "


def test_it_stands_above_a_bar() -> None:
    pytest.importorskip("tqdm")
    done = subprocess.run([sys.executable, "-c", BAR + SAY], capture_output=True, check=True)
    shown = [line.rpartition("\r")[2] for line in done.stderr.decode().split("\n")]  # what a terminal leaves standing
    assert shown[:2] == ["bmtrain: two units", "bmtrain: three"] and "0/3" in shown[2] and done.stdout == b""


@pytest.mark.parametrize(
    "before, out, err",
    [
        ("", "", SAID),
        ("import logging, sys; logging.basicConfig(stream=sys.stdout, level=0); ", "", SAID),
        ("import sys, types; sys.modules['tqdm'] = types.ModuleType('tqdm'); ", "", SAID),  # a stand-in of a script's
        ("import logging; logging.getLogger('bmtrain').setLevel('WARNING'); ", "", ""),
        (OWN, "bmtrain 0 two units\nbmtrain 1 three\n", ""),
    ],
)
def test_where_it_goes(tmp_path: Path, before: str, out: str, err: str) -> None:
    (tmp_path / "train.py").write_text(before + SAY)
    (done,) = run_script(tmp_path / "train.py")
    assert (done.stdout, done.stderr) == (out, err)


@pytest.mark.parametrize(
    ("tool", "step", "arguments"),
    [(doctor, "examine", []), (plot, "read", ["run.jsonl"]), (checkpoint, "_inspect", ["inspect", "folder"]),
     (estimate, "_job", ["models:make"])],
)  # fmt: skip
def test_after_ctrl_c_a_command_says_one_line(
    tool: Any, step: str, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, step, interrupted)
    assert tool.main(arguments) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith(": interrupted; no file was left half written\n")
    assert captured.err.count("\n") == 2


WARN = "from bmtrain.log import warn; [warn('the loss', stacklevel=1) for _ in range(2)]"
WARNED = f"train.py:2: UserWarning: the loss\n  {WARN}\n"
SAID_INSTEAD = "bmtrain: warning: the loss\n"


@pytest.mark.parametrize(
    "before, err",
    [
        ("", WARNED),
        ("warnings.filterwarnings('once')", WARNED),
        ("warnings.filterwarnings('ignore', message='the loss')", ""),  # that is about this one
        ("warnings.filterwarnings('ignore', module='__main__')", ""),
        ("warnings.filterwarnings('ignore', category=FutureWarning)", WARNED),
        ("warnings.filterwarnings('ignore', message='something else')", WARNED),
        ("warnings.filterwarnings('ignore')", SAID_INSTEAD),
        ("warnings.simplefilter('ignore')", SAID_INSTEAD),
        ("warnings.filterwarnings('ignore', category=UserWarning)", SAID_INSTEAD),
        ("warnings.simplefilter('ignore'); warnings.simplefilter('default')", WARNED),
        ("warnings.warn = lambda *a, **k: None", SAID_INSTEAD),
    ],
)
def test_scripts_that_ignore_all_warnings_are_told_all_the_same(tmp_path: Path, before: str, err: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"import warnings; {before}\n{WARN}")
    (done,) = run_script(script)
    assert (done.returncode, done.stdout, done.stderr.replace(f"{tmp_path}{os.sep}", "")) == (0, "", err)
