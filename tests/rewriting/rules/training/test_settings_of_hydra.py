"""Projects in which hydra makes objects of what files of settings name (``_target_: trainer.Trainer``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewriter.analyze.training import settings_files
from rewriter.convert import convert_paths
from rewriter.plan import Options

MAIN = """import hydra
import torch
from hydra.utils import instantiate


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    instantiate(cfg.trainer).train()


if __name__ == "__main__":
    main()
"""
TRAINER = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader


class Trainer:
    def __init__(self, model, optimizer, data):
        self.model, self.loader = model, DataLoader(data, batch_size=6)
        self.opt = optimizer(model.parameters())

    def train(self):
        for x, y in self.loader:
            self.opt.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.opt.step()
"""
NET = "import torch\n\n\nclass Net(torch.nn.Module):\n    pass\n"
SETTINGS = """model:
  _target_: parts.net.Net
optimizer:
  _target_: torch.optim.Adam
  _partial_: true
"""
LOOP = MAIN.replace(
    "import torch\n", "import torch\nimport torch.nn.functional as F\nfrom torch.utils.data import DataLoader\n"
)
LOOP = LOOP.replace(
    "    instantiate(cfg.trainer).train()\n",
    """    model = instantiate(cfg.model)
    opt = {}
    for x, y in DataLoader(instantiate(cfg.data), batch_size=6):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
""",
)


def converted(folder: Path, main: str, **settings: str) -> dict[str, str]:
    """The project's files after conversion, and what is reported, as ``said``."""
    files = {"main.py": main, "trainer.py": TRAINER, "parts/net.py": NET, "parts/__init__.py": ""}
    files |= {f"conf/{name}.yaml": text for name, text in settings.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    paths = [folder / name for name in files if name.endswith(".py")]
    results = convert_paths(paths, Options(), [folder])
    after = {str(result.path.relative_to(folder)): result.after.decode() for result in results}
    return after | {"said": "".join(finding.message for result in results for finding in result.reported)}


@pytest.mark.parametrize(
    "target",
    [
        "trainer:\n  _target_: trainer.Trainer\n  model: ${model}\n",
        "trainer:\n  '_target_': 'trainer.Trainer'\n",
        "trainers:\n  - _target_: trainer.Trainer\n",
        '_target_: "trainer.Trainer"\n',
        "trainer:\n  class: trainer.Trainer\n",
    ],
)
def test_a_trainer_that_settings_name_is_started(tmp_path: Path, target: str) -> None:
    after = converted(tmp_path, MAIN, config=SETTINGS, trainer=target)
    assert "    bmt.init_distributed(seed=0)\n    instantiate(cfg.trainer)" in after["main.py"]
    assert "self.optim_manager.add_optimizer(self.opt)" in after["trainer.py"]
    assert "class Net(bmt.DistributedModule)" in after["parts/net.py"]
    assert "init_distributed()" not in after["said"]


def test_a_script_may_name_a_file_of_settings(tmp_path: Path) -> None:
    main = MAIN.replace('config_path="conf", config_name="config"', 'config_path="conf/trainer.yaml"')
    after = converted(tmp_path, main, trainer="trainer:\n  class: trainer.Trainer\n")
    assert "    bmt.init_distributed(seed=0)\n    instantiate(cfg.trainer)" in after["main.py"]


def test_a_trainer_that_none_names_is_reported(tmp_path: Path) -> None:
    after = converted(tmp_path, MAIN, config=SETTINGS)
    assert "no script here starts this training" in after["said"]


def test_what_cannot_be_read_beside_settings_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "conf" / "folder.yaml").mkdir(parents=True)
    os.mkfifo(tmp_path / "conf" / "pipe.yaml")
    (tmp_path / "conf" / "gone.yaml").symlink_to(tmp_path / "nowhere")
    after = converted(tmp_path, MAIN, config=SETTINGS, trainer="_target_: trainer.Trainer\n")
    assert "    bmt.init_distributed(seed=0)\n    instantiate(cfg.trainer)" in after["main.py"]


def test_data_beside_settings_are_not_all_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_files, "_MOST", 3)
    data = tmp_path / "conf" / "data"
    data.mkdir(parents=True)
    for number in range(9):
        (data / f"{number}.bin").touch()
    (data / "later").mkdir()
    (data / "later" / "trainer.yaml").write_text("_target_: trainer.Trainer\n")
    assert "no script here starts" in converted(tmp_path, MAIN, config=SETTINGS)["said"]


def test_settings_elsewhere_are_not_the_scripts(tmp_path: Path) -> None:
    main = MAIN.replace('config_path="conf"', 'config_path="other"')
    assert "no script here starts" in converted(tmp_path, main, trainer="_target_: trainer.Trainer\n")["said"]


@pytest.mark.parametrize(
    "made",
    [
        "instantiate(cfg.optimizer, params=model.parameters())",
        "instantiate(cfg.optimizer, model.parameters())",
        "hydra.utils.instantiate(cfg.optimizer)(model.parameters())",
        "hydra.utils.get_class(cfg.optimizer._target_)(model.parameters(), lr=cfg.lr)",
        "hydra.utils.call(cfg.optimizer, params=model.parameters())",
    ],
)
def test_an_optimizer_of_settings_gets_its_manager(tmp_path: Path, made: str) -> None:
    after = converted(tmp_path, LOOP.replace("opt = {}", f"opt = {made}"), config=SETTINGS)
    assert f"    opt = {made}\n" in after["main.py"]
    assert "    optim_manager.add_optimizer(opt)\n" in after["main.py"] and "optim_manager.step()" in after["main.py"]
