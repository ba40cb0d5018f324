"""Ctrl-C at every moment: one line, exit code 130, and all is written or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewriter import __main__, cli, convert, output
from rewriter.cli import main

ROOT = Path(__file__).parents[2]
PLAIN = "import torch\n\n\nclass A(torch.nn.Module):\n    pass\n"
MODEL = """import time

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


def build():
    open("{mark}", "w").close()
    time.sleep(60)
    return Net(), (torch.ones(2, 2),)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    for name in ("a.py", "b.py", "c.py"):
        (root / name).write_text(PLAIN)
    return root


def interrupting(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, with Ctrl-C in front of one of its calls."""
    calls = [0]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return function(*arguments, **options)

    return interrupted


MOMENTS = {
    "while files are read": (cli, "convert_project", 1),
    "before anything is written": (output, "write_file", 1),
    "between two files": (output, "write_file", 2),
    "in the middle of a file": (convert.os, "chmod", 2),
}


@pytest.mark.parametrize("target", ["--write", "--output"])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_nothing_is_written(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: tuple[Any, str, int],
    target: str,
) -> None:  # fmt: skip
    module, name, call = moment
    monkeypatch.setattr(module, name, interrupting(getattr(module, name), call))
    there = project.with_name("there") / "below"
    assert main([str(project), target, *([str(there)] if target == "--output" else [])]) == 130
    assert capsys.readouterr().err == "\nbmt-convert: interrupted; nothing was written\n"
    assert sorted(path.name for path in project.iterdir()) == ["a.py", "b.py", "c.py"]
    assert all(path.read_text() == PLAIN for path in project.iterdir())
    assert os.listdir(project.parent) == ["project"]


@pytest.mark.parametrize("target", ["--write", "--output"])
def test_all_is_written(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """From the first file on that is put in its place, there is no half way."""
    replaced = output.os.replace
    monkeypatch.setattr(output.os, "replace", lambda *names: moved(*names))
    calls: list[int] = []

    def moved(*names: Any) -> None:
        replaced(*names)
        if ".bmt-" not in str(names[1]):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    there = project.with_name("there")
    assert main([str(project), target, *([str(there)] if target == "--output" else [])]) == 130
    done = "3 files changed in place" if target == "--write" else f"the project, converted, is in {there}"
    assert capsys.readouterr().err == f"\nbmt-convert: interrupted; {done}\n"
    folder = project if target == "--write" else there
    assert sorted(path.name for path in folder.iterdir()) == ["a.py", "b.py", "c.py"]
    assert all("bmt.DistributedModule" in path.read_text() for path in folder.iterdir())


@pytest.mark.parametrize(
    "tool", ["verify", *(pytest.param(tool, marks=pytest.mark.long) for tool in ("prove", "module"))]
)
def test_a_comparison_is_interrupted(tmp_path: Path, tool: str) -> None:
    """As a terminal does it: the signal goes to the whole group."""
    mark = tmp_path / "started"
    project = tmp_path / "project"
    project.mkdir()
    (project / "net.py").write_text(MODEL.format(mark=mark) + "\n\nif __name__ == '__main__':\n    build()\n")
    command = {
        "verify": ["rewriter", str(project), "--write", "--verify", "net:build"],
        "prove": ["rewriter", str(project), "--write", "--prove", "net.py"],
        "module": ["rewriter.verify", str(project), str(project), "net:build"],
    }[tool]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if tool == "prove":
        assert mark.exists() or process.poll() is not None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    name = "rewriter.verify" if tool == "module" else "bmt-convert"
    assert (process.returncode, errors) == (130, f"\n{name}: interrupted; nothing was written\n")
    assert "bmt" not in (project / "net.py").read_text()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("bmt-")]


class Interrupts:
    """Ctrl-C as a module is looked for."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "rewriter.cli":
            raise KeyboardInterrupt


def test_while_it_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "rewriter.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert __main__.main() == cli.INTERRUPTED
    assert capsys.readouterr().err == "\nbmt-convert: interrupted; nothing was written\n"
