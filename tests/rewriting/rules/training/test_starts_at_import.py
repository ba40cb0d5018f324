"""Files with statements of their own that a script imports: the ranks start once, before what needs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options
from rewriter.report import launch

RUN = """import torch
from {module} import {name}

{guard}
"""
MAIN = """def main():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, optimizer)


if __name__ == "__main__":
    main()
"""
FIT = """import os
import random

import numpy as np
import torch
from torch.utils.data import DataLoader

{top}


def fit(model, optimizer):
    for x in [torch.ones(2, 4)]:
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
"""
LIGHT = {
    "a seed": "torch.manual_seed(7)",
    "numpy's seed": "np.random.seed(12345)",
    "all seeds": "random.seed(7)\nnp.random.seed(7)\ntorch.manual_seed(7)\ntorch.cuda.manual_seed_all(7)",
    "output": 'print("loaded", torch.__version__)',
    "a seed in a test": "if torch.cuda.is_available():\n    torch.cuda.manual_seed(7)\ntorch.manual_seed(7)",
}
HEAVY = {
    "a loader": "loader = DataLoader([1, 2], batch_size=2)",
    "a model": "model = torch.nn.Linear(4, 2)",
    "an optimizer": "optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)",
    "a model behind a seed": "torch.manual_seed(0)\nmodel = torch.nn.Linear(4, 2)",
}


def project(tmp_path: Path, files: dict[str, str]) -> dict[str, str]:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    results = convert_paths([tmp_path / name for name in files], Options(), [tmp_path])
    found = {str(result.path.relative_to(tmp_path)): result.after.decode() for result in results}
    assert not any(result.error for result in results)
    return found


@pytest.mark.parametrize("top", LIGHT.values(), ids=LIGHT.keys())
def test_a_seed_in_an_imported_file_starts_nothing(tmp_path: Path, top: str) -> None:
    script = RUN.format(module="fit", name="fit", guard=MAIN)
    found = project(tmp_path, {"run.py": script, "fit.py": FIT.format(top=top)})
    assert "init_distributed" not in found["fit.py"]
    seed = "seed=7" if "torch.manual_seed" in top else ""
    assert f"def main():\n    bmt.init_distributed({seed})\n" in found["run.py"]
    assert top.splitlines()[-1].replace("print(", "bmt.print_rank(") in found["fit.py"]


@pytest.mark.parametrize("top", HEAVY.values(), ids=HEAVY.keys())
def test_what_needs_ranks_in_an_imported_file_starts_them(tmp_path: Path, top: str) -> None:
    script = RUN.format(module="fit", name="fit", guard=MAIN)
    found = project(tmp_path, {"run.py": script, "fit.py": FIT.format(top=top)})
    assert "bmt.init_distributed(" in found["fit.py"] and "init_distributed" not in found["run.py"]


def test_of_two_imported_files_the_first_starts_the_ranks(tmp_path: Path) -> None:
    script = "import torch\nimport data\nfrom fit import fit\n\n" + MAIN
    data = "import torch\n\n\nclass Net(torch.nn.Module):\n    pass\n\n\nnet = Net()\n"
    files = {"run.py": script, "data.py": data, "fit.py": FIT.format(top=HEAVY["a model"])}
    assert [name for name, text in project(tmp_path, files).items() if "init_distributed" in text] == ["data.py"]


def test_two_scripts_that_import_it_start_nothing(tmp_path: Path) -> None:
    script = "import torch\nfrom fit import fit\n\n" + MAIN
    files = {"one.py": script, "two.py": script, "fit.py": FIT.format(top=HEAVY["a model"])}
    assert [name for name, text in project(tmp_path, files).items() if "init_distributed" in text] == ["fit.py"]


def test_a_script_that_imports_it_in_a_function_starts_the_ranks_itself(tmp_path: Path) -> None:
    script = "import torch\n\n" + MAIN.replace("    fit(", "    from fit import fit\n    fit(")
    found = project(tmp_path, {"run.py": script, "fit.py": FIT.format(top=LIGHT["a seed"])})
    assert "    bmt.init_distributed(seed=7)\n" in found["run.py"] and "init_distributed" not in found["fit.py"]


def test_a_seed_of_a_file_that_is_run_alone_starts_the_ranks(tmp_path: Path) -> None:
    main = MAIN.split("\n\n\nif")[0] + "\nmain()\n"
    found = project(tmp_path, {"fit.py": FIT.format(top="torch.manual_seed(7)") + "\n" + main})
    assert "bmt.init_distributed(seed=7)\n" in found["fit.py"]


IMPORTED = "import torch\n\n\nclass Net(torch.nn.Module):\n    pass\n\n\nnet = Net()\n"


@pytest.mark.parametrize(
    ("first", "starts"),
    [
        ("torch.manual_seed(7)\n", "run.py"),
        ("import fit\nfit.seed(7)\n", "run.py"),
        ("print('hello')\n", "run.py"),
        ("path = 'a'\n", "data.py"),
        ("", "data.py"),
    ],
)
def test_a_seed_before_the_import_is_not_undone_by_it(tmp_path: Path, first: str, starts: str) -> None:
    files = {
        "run.py": f"import torch\n{first}from data import net\nfrom fit import fit\n\nfit(net)\n",
        "data.py": IMPORTED,
        "fit.py": FIT.format(top="def seed(n):\n    torch.manual_seed(n)"),
    }
    found = project(tmp_path, files)
    assert [name for name, text in found.items() if "init_distributed" in text] == [starts]
    results = convert_paths([tmp_path / name for name in files], Options(), [tmp_path])
    assert launch(results, lambda path: Path(path.name)).endswith("torchrun --nproc_per_node=N run.py")


@pytest.mark.parametrize("shown", ["say('hello')", "say('hello', 2)"])
def test_a_function_that_prints_starts_nothing(tmp_path: Path, shown: str) -> None:
    files = {
        "run.py": RUN.format(module="fit", name="fit", guard=MAIN),
        "fit.py": FIT.format(top=f"def say(text, times=1):\n    print(text * times)\n\n\n{shown}"),
    }
    found = project(tmp_path, files)
    assert "init_distributed" not in found["fit.py"] and "bmt.init_distributed()" in found["run.py"]


PACKAGED = """import torch

net = torch.nn.Linear(1, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def train(x):
    opt.zero_grad()
    net(x).mean().backward()
    opt.step()


class Trainer:
    def fit(self, x):
        train(x)


def main():
    Trainer().fit(torch.ones(1, 1))


{call}
"""


@pytest.mark.parametrize(
    ("call", "runs"),
    [
        ("for x in torch.ones(3, 1, 1):\n    train(x)", True),
        ("main()", True),
        ("Trainer().fit(torch.ones(1, 1))", True),
        ("if __name__ == '__main__':\n    main()", True),
        ("print('ready')", False),
        ("run = Trainer", False),
    ],
)
def test_a_script_in_a_package(tmp_path: Path, call: str, runs: bool) -> None:
    found = project(tmp_path, {"pack/__init__.py": "", "pack/train.py": PACKAGED.format(call=call)})
    assert ("bmt.init_distributed()" in found["pack/train.py"]) == runs


def test_a_loader_made_at_import_starts_the_ranks(tmp_path: Path) -> None:
    data = "from torch.utils.data import DataLoader\n\ntrain_loader = DataLoader([1.0, 2.0], batch_size=2)\n"
    train = "import torch\nfrom data import train_loader\n\nnet = torch.nn.Linear(1, 1)\n"
    train += "opt = torch.optim.SGD(net.parameters(), lr=0.1)\nfor x in train_loader:\n"
    train += "    loss = net(x).mean()\n    loss.backward()\n    opt.step()\n"
    found = project(tmp_path, {"data.py": data, "train.py": train})
    assert "bmt.init_distributed()\ntrain_loader = bmt.shard_loader(" in found["data.py"]
    assert "init_distributed" not in found["train.py"]
    results = convert_paths([tmp_path / "data.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert launch(results, lambda path: Path(path.name)) == "ready to launch: torchrun --nproc_per_node=N train.py"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("my train.py", "torchrun --nproc_per_node=N 'my train.py'"),
        ("1 - Nets.ipynb", "jupyter nbconvert --to script '1 - Nets.ipynb'; torchrun --nproc_per_node=N '1 - Nets.py'"),
    ],
)
def test_the_command_is_one_that_runs(tmp_path: Path, name: str, command: str) -> None:
    text = "import torch\n\nnet = torch.nn.Linear(1, 1)\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
    text += "net(torch.ones(1, 1)).mean().backward()\nopt.step()\n"
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": text}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / name).write_text(json.dumps(notebook) if name.endswith("b") else text)
    results = convert_paths([tmp_path / name], Options(), [tmp_path])
    assert launch(results, lambda path: Path(path.name)).endswith(command)
