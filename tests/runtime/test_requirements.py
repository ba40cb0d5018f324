"""A torch that is missing, old or without a private name: one clear line at import."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bmtrain import requirements

ROOT = Path(__file__).parents[2]
TORCHES = {
    "none": (None, "torch is not installed: pip install 'bmtrain[train]'"),
    "old": ("__version__ = '2.8.1+cu128'", "bmtrain trains with torch 2.9 or later, and this is torch 2.8.1+cu128"),
    "another": ("__version__ = '3.0.0'", "which torch 3.0.0 does not have: install a newer bmtrain"),
}


@pytest.mark.parametrize(("content", "message"), TORCHES.values(), ids=TORCHES.keys())
def test_one_line_says_what_to_do(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "torch.py").write_text(content)
    hide = "import sys; sys.modules['torch'] = None; " if content is None else ""
    hide = hide.replace("sys.modules['torch'] = None", "sys.meta_path.insert(0, type('No', (), dict(find_spec=find)))")
    find = (
        "def find(name, path=None, target=None):\n    if name == 'torch':\n"
        "        raise ModuleNotFoundError('no', name='torch')\n"
    )
    code = f"{find}import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; {hide}import bmtrain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith("ImportError: ") and message in last
    assert "During handling" not in done.stderr


def run_command(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """``command``, as a script of that name or a module, with the torch that stands in ``folder``."""
    entry = folder / command
    entry.write_text("import bmtrain")
    given = command.split() if command.startswith("-m") else [str(entry)]
    line = [sys.executable, *given, "plot", "--help"]
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    "command", ["bmt", "bmt-doctor", "bmt-checkpoint", "-m bmtrain", "-mbmtrain", "-m bmtrain.checkpoint"]
)
def test_commands_say_it_without_a_traceback(tmp_path: Path, command: str) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.8.1'")
    done = run_command(tmp_path, command)
    name = "bmt" if command.startswith("-m") else command
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"{name}: bmtrain trains with torch 2.9 or later, and this is torch 2.8.1: pip install --upgrade torch\n"
    )


@pytest.mark.parametrize("command", ["bmt", "-m bmtrain", "train.py"])
def test_a_command_that_is_interrupted_while_torch_loads_says_so_in_a_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = run_command(tmp_path, command)
    assert done.returncode == -signal.SIGINT and done.stdout == ""  # what a shell calls 130
    if command == "train.py":
        assert "Traceback" in done.stderr  # the script's own affair
    else:
        assert done.stderr == "\nbmt: interrupted; nothing was done\n"


def test_scripts_get_an_error_that_they_can_catch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.8.1'")
    for name in ("bmtrain.py.txt", "train"):
        (tmp_path / name).write_text("try:\n    import bmtrain\nexcept ImportError:\n    print('caught')\n")
        environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        line = [sys.executable, str(tmp_path / name), "bmtrain"]
        assert subprocess.check_output(line, text=True, env=environment) == "caught\n"


def test_a_later_torch_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2.9.0", "2.10.0a0+git1", "3.1", "nightly"):
        monkeypatch.setattr(torch, "__version__", version)
        requirements.check()


def test_every_private_name_is_looked_for() -> None:
    used = set()
    for path in (ROOT / "bmtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("torch"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= {name for name in names if any(part.startswith("_") for part in name.split("."))}
    assert used == set(requirements.PRIVATE)


def test_the_converter_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; from rewriter.cli import main; main(['-h'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bmt-convert" in done.stdout
