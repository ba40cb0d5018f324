"""Modules of folders that a script puts on Python's path are the project's, wherever they lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

SCRIPT = """import os
import sys
from pathlib import Path

{added}
import torch
import datas
from nets import Net

ROOT = os.path.dirname(os.path.abspath(__file__))


def main():
    net = torch.nn.DataParallel(Net())
    loader = datas.fetch(4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in loader:
        loss = (net(x) - y).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
"""
NETS = """from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, x):
        return self.body(x)
"""
DATAS = """import torch.utils.data as data


def fetch(size):
    return data.DataLoader(made, batch_size=size, shuffle=True)
"""
ADDED = {
    "by name": 'sys.path.append("core")',
    "in front": 'sys.path.insert(0, "core")',
    "beside the script": 'sys.path.append(os.path.join(os.path.dirname(__file__), "core"))',
    "from the root": 'ROOT = os.path.dirname(os.path.abspath(__file__))\nsys.path.append(os.path.join(ROOT, "core"))',
    "a path": 'sys.path.insert(0, str(Path(__file__).parent / "core"))',
    "an f-string": 'here = os.getcwd()\nsys.path.append(f"{here}/core")',
    "with a dot": 'sys.path.append("./core/")',
    "by a name": 'HERE = os.path.dirname(__file__)\nCORE = os.path.join(HERE, "core")\nsys.path.insert(0, CORE)',
    "by a function": 'def add(path):\n    if path not in sys.path:\n        sys.path.insert(0, path)\n\nadd("core")',
    "by a function and a name": "HERE = os.path.dirname(__file__)\n\n\ndef add(path):\n    sys.path.insert(0, path)\n\n"
    'core = os.path.join(HERE, ".", "core")\nadd(core)',
    "in a loop": 'for folder in ("data", "core"):\n    sys.path.append(folder)',
    "several": 'sys.path.extend(["data", "core"])',
    "added": 'sys.path += ["core"]',
    "set": 'sys.path = [os.path.join(os.getcwd(), "core")] + sys.path',
    "by its place": 'sys.path[0:0] = ["core"]',
    "above": 'sys.path.append(os.path.join("core", os.pardir, "core"))',
    "a path by a name": 'CORE = Path(__file__).resolve().parent / "core"\nsys.path.append(str(CORE))',
    "as a site": 'import site\n\nsite.addsitedir("core")',
    "from beside": 'sys.path.append("../project/core")',
}


def run(folder: Path, added: str) -> dict[str, str]:
    files = {"train.py": SCRIPT.format(added=added), "core/nets.py": NETS, "core/datas.py": DATAS}
    (folder / "project" / "core").mkdir(parents=True)
    for name, text in files.items():
        (folder / "project" / name).write_text(text)
    results = convert_paths([folder / "project" / name for name in files], Options(), [folder / "project"])
    assert not any(result.error for result in results)
    return {result.path.name: result.after.decode() for result in results}


@pytest.mark.parametrize("added", ADDED.values(), ids=ADDED.keys())
def test_their_modules_are_found(tmp_path: Path, added: str) -> None:
    after = run(tmp_path, added)
    assert "bmt.shard_loader(data.DataLoader(" in after["datas.py"]
    assert "net = Net()" in after["train.py"] and "class Net(bmt.DistributedModule)" in after["nets.py"]


@pytest.mark.parametrize("added", ['sys.path.append("other")', "sys.path.append(folder)", "print('core')"])
def test_others_are_not(tmp_path: Path, added: str) -> None:
    assert "shard_loader" not in run(tmp_path, added)["datas.py"]
