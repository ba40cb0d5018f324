"""A class that trains, which no script is seen to use: the last line says so, whatever else could be launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.cli import main

TRAINER = """import torch


class Trainer:
    def __init__(self, config):
        self.config, self.optimizer = config, None

    def train(self, model, loader):
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in loader:
            loss = model(x).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
"""
SHOWN = """import torch


class Embedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


if __name__ == "__main__":
    print(Embedding()(torch.ones(2, 4)).sum())
"""
BY_NAME = """import pickle
import sys

trainer = pickle.load(open(sys.argv[1], "rb"))
trainer.train(*pickle.load(open(sys.argv[2], "rb")))
"""
STARTS = """import torch

from trainer import Trainer

Trainer(None).train(torch.nn.Linear(4, 4), [torch.ones(2, 4)])
"""


def last_line(folder: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    for name, text in files.items():
        (folder / name).write_text(text)
    main([str(folder), "--write"])
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("others", [{}, {"embedding.py": SHOWN}, {"embedding.py": SHOWN, "train.py": BY_NAME}])
def test_it_is_not_ready(others: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = last_line(tmp_path, {"trainer.py": TRAINER, **others}, capsys)
    assert last.startswith("not ready to launch: nothing here starts the training in ") and "trainer.py" in last


@pytest.mark.parametrize("others", [{}, {"embedding.py": SHOWN}, {"other.py": TRAINER.replace("Trainer", "Other")}])
def test_it_is_ready_where_a_script_starts_one(
    others: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = last_line(tmp_path, {"trainer.py": TRAINER, "train.py": STARTS, **others}, capsys)
    assert last.endswith(f"torchrun --nproc_per_node=N {tmp_path / 'train.py'}")


EVALUATES = """from accelerate import Accelerator
from unknown import run


def evaluate(args):
    accelerator = Accelerator(kwargs_handlers=[args])
    for item in args.items:
        run(item, accelerator)
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    evaluate(None)
"""
TRAINS = """import torch

net = torch.nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4):
    opt.zero_grad()
    net(x).mean().backward()
    opt.step()
"""


def test_a_script_of_accelerate_that_only_evaluates_holds_nothing_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = last_line(tmp_path, {"train.py": TRAINS, "evaluation.py": EVALUATES}, capsys)
    assert said.startswith("ready") and said.endswith("train.py")


@pytest.mark.parametrize("line", ["net = accelerator.prepare(item)", "accelerator.backward(item)"])
def test_one_that_trains_does(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    text = EVALUATES.replace("accelerator.wait_for_everyone()", line)
    said = last_line(tmp_path, {"train.py": TRAINS, "evaluation.py": text}, capsys)
    assert said.startswith("not ready to launch")
