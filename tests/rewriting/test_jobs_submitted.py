"""Scripts that hand training to submitit: they start no ranks, and are not what is launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.cli import main

ENGINE = """def train_one_epoch(model, loader, optimizer):
    for x in loader:
        loss = model(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""
MAIN = """import argparse

import torch

from engine import train_one_epoch


def get_args_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    return parser


def main(args):
    model = torch.nn.Linear(4, 4)
    train_one_epoch(model, [torch.ones(2, 4)], torch.optim.SGD(model.parameters(), lr=args.lr))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
"""
SUBMITS = """import os

import main as classification
import submitit


class Trainer:
    def __init__(self, args):
        self.args = args

    def __call__(self):
        classification.main(self.args)


def run():
    args = classification.get_args_parser().parse_args()
    executor = submitit.AutoExecutor(folder="jobs")
    os.makedirs("jobs", exist_ok=True)
    job = executor.submit(Trainer(args))
    print(job.job_id)


if __name__ == "__main__":
    run()
"""
SAID = "each process of this job would train alone"
SCRIPTS = {
    "as a job": SUBMITS,
    "as jobs": SUBMITS.replace("executor.submit(Trainer(args))", "executor.map_array(Trainer(args), [1])[0]"),
    "by the name of its executor": SUBMITS.replace("import submitit", "from submitit import AutoExecutor").replace(
        "submitit.AutoExecutor", "AutoExecutor"
    ),
    "of a function": SUBMITS.replace("Trainer(args)", "classification.main, args"),
}


def lines(folder: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    for name, text in files.items():
        (folder / name).write_text(text)
    main([str(folder), "--write"])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
@pytest.mark.parametrize("name", ["run_with_submitit.py", "train_job.py"])
def test_the_script_that_it_runs_is_launched(
    name: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = lines(tmp_path, {"engine.py": ENGINE, "main.py": MAIN, name: script}, capsys)
    assert not said[-1].startswith("not ready") and said[-1].endswith("main.py")
    assert sum(SAID in line for line in said) == 1
    assert (tmp_path / name).read_text() == script
    assert "bmt.init_distributed(" in (tmp_path / "main.py").read_text()


def test_a_script_that_trains_and_submits_itself_is_launched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = """    args = get_args_parser().parse_args()
    if args.lr < 0:
        submitit.AutoExecutor("jobs").submit(main, args)
    else:
        main(args)"""
    script = MAIN.replace("import torch\n", "import submitit\nimport torch\n")
    script = script.replace("    main(get_args_parser().parse_args())", starts)
    script = script.replace("from engine import train_one_epoch\n", "")
    script = script.replace("def get_args", ENGINE + "\n\ndef get_args", 1)
    said = lines(tmp_path, {"train.py": script}, capsys)
    assert said[-1].endswith("train.py") and SAID not in "".join(said)


@pytest.mark.parametrize("line", ["pool.submit(work, args)", "import submititor"])
def test_what_submits_elsewhere_is_as_before(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "from concurrent.futures import ThreadPoolExecutor\n\nimport main as one\n\n"
    script += (
        f'if __name__ == "__main__":\n    args = one.get_args_parser().parse_args()\n    {line}\n    one.main(args)\n'
    )
    said = lines(tmp_path, {"engine.py": ENGINE, "main.py": MAIN, "other.py": script}, capsys)
    assert SAID not in "".join(said)
