"""An object of the project's that steps an optimizer inside is no optimizer: what it holds gets the manager."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

from ...helpers import converted

HOLDER = """import torch


class Noam:
    def __init__(self, params):
        self.optimizer = torch.optim.SGD(params, lr=0.1)
        self.count = 0

    def step(self):
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / self.count
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()
"""
HEAD = "import torch\n\nmodel = torch.nn.Linear(4, 1)\nloader = torch.utils.data.DataLoader(data, batch_size=4)\n"
LOOP = """for x in loader:
    {zero}
    loss = model(x).mean()
    loss.backward()
    {name}.step()
"""
IN_FUNCTION = "def train(model, optimizer, loader):\n" + "".join(
    f"    {line}\n" for line in LOOP.format(zero="optimizer.zero_grad()", name="optimizer").splitlines()
)
FROM_OUTSIDE = HOLDER.replace("torch.optim.SGD(params, lr=0.1)", "params")
MADE = "Noam(model.parameters())"
PLACES = {
    "beside": {"train.py": f"{HOLDER}\n\n{HEAD}opt = {MADE}\n{LOOP.format(zero='opt.zero_grad()', name='opt')}"},
    "the model clears": {
        "train.py": f"{HOLDER}\n\n{HEAD}opt = {MADE}\n" + LOOP.format(zero="model.zero_grad()", name="opt")
    },
    "given one": {
        "train.py": f"{FROM_OUTSIDE}\n\n{HEAD}opt = Noam(torch.optim.Adam(model.parameters()))\n"
        + LOOP.format(zero="opt.optimizer.zero_grad()", name="opt")
    },
    "imported": {
        "noam.py": HOLDER,
        "train.py": f"import noam\n{HEAD}optimizer = noam.{MADE}\n"
        + LOOP.format(zero="optimizer.zero_grad()", name="optimizer"),
    },
    "handed on": {"train.py": f"{HOLDER}\n\n{IN_FUNCTION}\n\n{HEAD}opt = {MADE}\ntrain(model, opt, loader)\n"},
    "to another file": {
        "noam.py": HOLDER,
        "loop.py": IN_FUNCTION,
        "train.py": f"from loop import train\nfrom noam import Noam\n{HEAD}opt = {MADE}\ntrain(model, opt, loader)\n",
    },
    "from a function": {
        "noam.py": f"{HOLDER}\n\ndef get(model):\n    return {MADE}\n",
        "loop.py": IN_FUNCTION,
        "train.py": f"from loop import train\nfrom noam import get\n{HEAD}optimizer = get(model)\n"
        "train(model, optimizer, loader)\n",
    },
    "in a trainer": {
        "noam.py": HOLDER,
        "train.py": f"from noam import Noam\n{HEAD}\n\nclass Trainer:\n    def __init__(self):\n"
        f"        self.optimizer = {MADE}\n\n    def run(self):\n"
        + "".join(
            f"        {line}\n"
            for line in LOOP.format(zero="self.optimizer.zero_grad()", name="self.optimizer").splitlines()
        )
        + "\n\nTrainer().run()\n",
    },
}  # fmt: skip


@pytest.mark.parametrize("files", PLACES.values(), ids=PLACES.keys())
def test_what_the_object_holds_gets_the_manager(files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    results = convert_paths([tmp_path / name for name in files], Options(), [tmp_path])
    after = "".join(result.after.decode() for result in results)
    assert after.count("add_optimizer(") == 1 and "add_optimizer(self.optimizer)" in after
    assert "optim_manager.step()" in after
    assert "OptimManager(loss_scale=None).backward(loss)" in after or "optim_manager.backward(loss)" in after
    assert "bmt.shard_loader(" in after
    assert "bmt.BMTrainModelWrapper(torch.nn.Linear(4, 1))" in after or "def get(" in after


def test_a_subclass_of_torchs_gets_one_itself() -> None:
    own = "class Sign(torch.optim.Optimizer):\n    def step(self):\n        pass\n\n\n"
    text = HEAD.replace("model =", own + "model =", 1) + "opt = Sign(model.parameters(), {})\n"
    assert "optim_manager.add_optimizer(opt)" in converted(text + LOOP.format(zero="opt.zero_grad()", name="opt"))


def test_a_holder_in_a_module_that_a_star_import_brings(tmp_path: Path) -> None:
    package = tmp_path / "parts"
    package.mkdir()
    (package / "__init__.py").write_text('__all__ = ["schedule"]\n')
    (package / "schedule.py").write_text(HOLDER)
    (tmp_path / "train.py").write_text(
        "import torch\nfrom parts import *\n\nnet = torch.nn.Linear(4, 1)\nopt = schedule.Noam(net.parameters())\n"
        "for x in batches:\n    opt.zero_grad()\n    net(x).mean().backward()\n    opt.step()\n"
    )
    results = convert_paths(sorted(tmp_path.rglob("*.py")), Options(), [tmp_path])
    (held,) = [result for result in results if result.path.name == "schedule.py"]
    assert "self.optim_manager.step()" in held.after.decode()
