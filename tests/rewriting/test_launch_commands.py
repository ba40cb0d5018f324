"""The command of the last line starts the user's script, from where Python finds what the script imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """import torch
{imports}

net = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def step(x):
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()


if __name__ == "__main__":
    step(torch.ones(8, 4))
"""
TRAINER = """class Trainer:
    def __init__(self, net, opt):
        self.net, self.opt = net, opt

    def step(self, x):
        loss = self.net(x).mean()
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
"""
BY_TRAINER = """import torch
from package.train import Trainer

net = torch.nn.Linear(4, 2)
{does}
"""
PROJECTS = {
    "beside it": ({"scripts/train.py": "import helpers", "scripts/helpers.py": ""}, "scripts/train.py"),
    "a package": ({"scripts/train.py": "import packaging.version"}, "scripts/train.py"),
    "put on the path": (
        {"scripts/train.py": "import sys\nsys.path.append('.')\nimport helpers", "helpers.py": ""},
        "scripts/train.py",
    ),
    "at the top": ({"train.py": "import helpers.more", "helpers/__init__.py": "", "helpers/more.py": ""}, "train.py"),
}
ABOVE = {
    "a file": {"scripts/train.py": "import helpers", "helpers.py": ""},
    "a folder": {"scripts/train.py": "from helpers import more", "helpers/__init__.py": "", "helpers/more.py": ""},
    "its own package": {"toolkit/bin/train.py": "from toolkit import more", "toolkit/more.py": ""},
}


def last_line(folder: Path, files: dict[str, str], *options: str) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            TRAIN.format(imports=text) if name.endswith("train.py") and "class" not in text else text
        )
    command = [sys.executable, "-m", "rewriter", ".", *(options or ("--write",))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize(("files", "script"), PROJECTS.values(), ids=PROJECTS.keys())
def test_imports_that_are_found_need_nothing(tmp_path: Path, files: dict[str, str], script: str) -> None:
    assert last_line(tmp_path, files).endswith(f"torchrun --nproc_per_node=N {script}")
    assert "PYTHONPATH" not in last_line(tmp_path, files)


@pytest.mark.parametrize("files", ABOVE.values(), ids=ABOVE.keys())
def test_a_folder_above_is_named(tmp_path: Path, files: dict[str, str]) -> None:
    assert last_line(tmp_path, files).endswith(f"PYTHONPATH=. torchrun --nproc_per_node=N {next(iter(files))}")


def test_it_is_where_the_project_was_written(tmp_path: Path) -> None:
    line = last_line(tmp_path, ABOVE["a file"], "--output", "there")
    assert line.endswith("PYTHONPATH=there torchrun --nproc_per_node=N there/scripts/train.py")


def test_a_module_of_the_same_name_in_a_package_is_another(tmp_path: Path) -> None:
    files = {
        "package/__init__.py": "",
        "package/train.py": TRAINER,
        "interpolate.py": BY_TRAINER.format(does="Trainer(net, None)\nprint(net(torch.ones(1, 4)))"),
        "train.py": "from package.train import Trainer",
    }
    assert last_line(tmp_path, files).endswith("torchrun --nproc_per_node=N train.py")
