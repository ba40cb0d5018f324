# ruff: noqa: E501 - tables of code are easier to read on one line
"""A script that makes a class which trains is a program, however it names the class, and whoever else imports it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.cli import main

FILES = {
    "models/__init__.py": "",
    "models/first.py": """import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.a(x)
""",
    "work/__init__.py": "",
    "work/basic.py": """class Basic:
    def __init__(self, args):
        self.args = args
        self.model = self.build()
""",
    "work/trainer.py": """import torch
from models import first
from torch.utils.data import DataLoader, TensorDataset
from work.basic import Basic


class Main(Basic):
    def build(self):
        table = {"first": first}
        return table[self.args].Model()

    def train(self):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for (x,) in DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4):
            loss = self.model(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(loss.item())
""",
}
HEAD = "import sys\nfrom work.trainer import Main\n\n\ndef main():\n    "
CALLS = '\n\n\nif __name__ == "__main__":\n    main()\n'
RUNS = {
    "itself": "Main('first').train()",
    "an alias": "Trainer = Main\n    trainer = Trainer('first')\n    trainer.train()",
    "a table": "{'a': Main}[sys.argv[1]]('first').train()",
    "a table with a name": "tasks = {'a': Main}\n    Trainer = tasks[sys.argv[1]]\n    Trainer('first').train()",
    "a table asked": "tasks = {'a': Main}\n    tasks.get(sys.argv[1])('first').train()",
    "a choice": "if sys.argv:\n        Trainer = Main\n    else:\n        Trainer = dict\n    Trainer('first').train()",
    "a choice in a line": "Trainer = Main if sys.argv else None\n    Trainer('first').train()",
    "a module's": "import work.trainer\n    getattr(work.trainer, 'Main')('first').train()",
    "a global": "globals()['Main']('first').train()",
    "evaluated": "eval('Main')('first').train()",
    "of a subclass": "class Own(Main):\n        pass\n\n    Own('first').train()",
}
OTHERS = {
    "nobody": "",
    "one that makes it": f"{HEAD}Trainer = Main\n    print(Trainer('first').model){CALLS}",
    "one that prints": "from work.trainer import Main\n\nprint(Main.__name__)\n",
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", RUNS)
def test_the_script_starts_the_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, other: str) -> None:
    beside = {"predict.py": OTHERS[other]} if OTHERS[other] else {}
    for path, text in {**FILES, **beside, "run.py": HEAD + RUNS[name] + CALLS}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    main([str(tmp_path), "--write"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ready") and last.endswith("run.py")
    assert "bmt.init_distributed()" in (tmp_path / "run.py").read_text()
    if other != "nobody":
        assert ("bmt." in (tmp_path / "predict.py").read_text()) == (other == "one that makes it")


LISTED = {
    "glob": "from os.path import basename, dirname, join\nimport glob\n\n__all__ = [basename(f)[:-3] for f in glob.glob(join(dirname(__file__), '*.py'))]\n",
    "a list": "import os\n\n__all__ = []\nfor name in os.listdir(os.path.dirname(__file__)):\n    __all__.append(name[:-3])\n",
    "modules": "import pkgutil\n\n__all__ = [m.name for m in pkgutil.iter_modules(__path__)]\n",
}


@pytest.mark.parametrize("name", LISTED)
def test_modules_that_a_package_finds_in_its_folder_are_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = "from work import *\nimport sys\n\nif __name__ == '__main__':\n    kind = eval('{0}.{1}'.format(*sys.argv[1:]))\n    kind('first').train()\n"
    for path, text in {**FILES, "work/__init__.py": LISTED[name], "run.py": run}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.chdir(tmp_path)
    main([".", "--write"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ready") and last.endswith("run.py")
    assert "bmt.init_distributed()" in (tmp_path / "run.py").read_text()
