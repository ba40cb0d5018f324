"""An optimizer that a class above makes or takes gets its manager where an object first has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

MAKES = """import torch


class Base:
    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
TAKES = """class Base:
    def __init__(self, model, optimizer):
        self.model = model
        self.optimizer = optimizer
"""
MAY_TAKE = TAKES.replace("model, optimizer)", "model, optimizer=None)")
EPOCH = """
    def epoch(self, loader):
        for x in loader:
            self.optimizer.zero_grad()
            loss = self.model(x).mean()
            loss.backward()
            self.optimizer.step()
"""
INIT = """
    def __init__(self, *args):
        super().__init__(*args)
        self.epochs = 3
"""
OLD_INIT = INIT.replace("super()", "super(Trainer, self)")
NAMED_INIT = INIT.replace("super().__init__(*args)", "Base.__init__(self, *args)")
TRAINER = "\n\nclass Trainer(Base):\n"
MAIN = """
model = torch.nn.Linear(4, 1)
loader = torch.utils.data.DataLoader(data, batch_size=4)
Trainer(model{given}).epoch(loader)
"""
OPTIMIZER = ", torch.optim.SGD(model.parameters(), lr=0.1)"
BESIDE = {
    "made": MAKES + TRAINER + INIT + EPOCH,
    "made, without an __init__": MAKES + TRAINER + EPOCH,
    "taken": TAKES + TRAINER + INIT + EPOCH,
    "two levels up": MAKES + "\n\nclass Middle(Base):\n    pass\n" + TRAINER.replace("Base", "Middle") + EPOCH,
    "two classes below": MAKES + TRAINER + INIT + EPOCH + TRAINER.replace("Trainer", "Other") + EPOCH,
}
ELSEWHERE = {
    "made": (MAKES, INIT),
    "taken": (TAKES, INIT),
    "super with names": (TAKES, OLD_INIT),
    "by the base's name": (MAKES, NAMED_INIT),
}


def _after(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).write_text(text)
    results = convert_paths([folder / name for name in files], Options(), [folder])
    assert not [result for result in results if result.error]
    return "".join(result.after.decode() for result in results)


@pytest.mark.parametrize("text", BESIDE.values(), ids=BESIDE.keys())
def test_a_class_above_in_the_file_makes_the_manager(text: str, tmp_path: Path) -> None:
    after = _after(tmp_path, {"train.py": "import torch\n\n\n" + text + MAIN.format(given=OPTIMIZER)})
    assert after.count("add_optimizer(self.optimizer)") == 1
    assert "self.optim_manager.backward(loss)" in after and "self.optim_manager.step()" in after
    assert "self.optimizer.step()" not in after


@pytest.mark.parametrize(("base", "init"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_class_of_another_file_gives_it_to_the_one_that_trains(base: str, init: str, tmp_path: Path) -> None:
    given = OPTIMIZER if base is TAKES else ""
    script = "import torch\nfrom base import Base\n" + TRAINER + init + EPOCH + MAIN.format(given=given)
    after = _after(tmp_path, {"base.py": base, "train.py": script})
    lines = [line.strip() for line in after.splitlines()]
    place = next(n for n, line in enumerate(lines) if "__init__(" in line and not line.startswith("def"))
    assert lines[place + 1] == "self.optim_manager = bmt.optim.OptimManager(loss_scale=None)"
    assert lines[place + 2] == "self.optim_manager.add_optimizer(self.optimizer)"
    assert "self.optim_manager.backward(loss)" in after and "self.optim_manager.step()" in after


@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_that_may_be_none_is_added_only_if_it_is_there(elsewhere: bool, tmp_path: Path) -> None:
    trainer = TRAINER + INIT + EPOCH + MAIN.format(given=OPTIMIZER)
    beside = {"train.py": "import torch\n\n\n" + MAY_TAKE + trainer}
    apart = {"base.py": MAY_TAKE, "train.py": "import torch\nfrom base import Base\n" + trainer}
    after = _after(tmp_path, apart if elsewhere else beside)
    lines = [line.strip() for line in after.splitlines()]
    place = lines.index("self.optim_manager.add_optimizer(self.optimizer)")
    assert lines[place - 1] == "if self.optimizer is not None:"


def test_without_an_init_of_its_own_a_class_whose_base_is_elsewhere_is_refused(tmp_path: Path) -> None:
    script = "import torch\nfrom base import Base\n" + TRAINER + EPOCH + MAIN.format(given="")
    (tmp_path / "base.py").write_text(MAKES)
    (tmp_path / "train.py").write_text(script)
    results = convert_paths([tmp_path / "base.py", tmp_path / "train.py"], Options(), [tmp_path])
    said = [finding.message for result in results for finding in result.reported]
    assert any("self.optimizer is not made in this file" in message for message in said)


def test_an_attribute_that_the_class_sets_itself_is_its_own(tmp_path: Path) -> None:
    own = "\n    def __init__(self, model):\n        self.model = model\n"
    own += "        self.optimizer = torch.optim.Adam(model.parameters())\n"
    after = _after(tmp_path, {"train.py": MAKES + TRAINER + own + EPOCH + MAIN.format(given="")})
    assert after.count("add_optimizer(self.optimizer)") == 1
    assert after.index("add_optimizer(self.optimizer)") > after.index(
        "torch.optim.Adam(" if "torch.optim.Adam(" in after else "AdamOptimizer("
    )
