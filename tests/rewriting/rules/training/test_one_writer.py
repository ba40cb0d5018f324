# ruff: noqa: E501 - tables of code are easier to read on one line
"""One rank makes a log's writer, in every spelling; what one rank makes already stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from ...helpers import converted

HEAD = """import argparse
import os
import aim
import mlflow
import swanlab
import tensorboardX
import torch
import wandb
from tensorboardX import SummaryWriter as TBX
from torch.utils import tensorboard
from torch.utils.tensorboard import SummaryWriter

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
"""
TRAIN = """for x in loader:
    loss = net(x).mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
"""
KEPT = [
    "if rank == 0:\n    writer = SummaryWriter('runs')",
    "if args.rank == 0 and args.log:\n    wandb.init(project='x')",
    "wandb.init(project='x', mode='disabled')",
    "writer = csv.writer(out)",
    "writer = make(SummaryWriter)",
]


@pytest.mark.parametrize("text", KEPT)
def test_kept(text: str) -> None:
    assert f"\n{text}\n" in converted(HEAD + text + "\n" + TRAIN)


DISABLED = 'bmt.rank() == 0 else "disabled"'
ONE = "bmt.on_rank_0(SummaryWriter)"
CASES = {
    "plain": ("writer = SummaryWriter()", f"writer = {ONE}()"),
    "a path": ("writer = SummaryWriter(os.path.join(d, 'a'), comment='x')", f"= {ONE}(os.path.join(d, 'a'), comment='x')"),
    "or none": ("writer = SummaryWriter(d) if tb else None", f"writer = {ONE}(d) if tb else None"),
    "module": ("writer = tensorboard.SummaryWriter(d)", "writer = bmt.on_rank_0(tensorboard.SummaryWriter)(d)"),
    "tensorboardX": ("writer = tensorboardX.SummaryWriter(d)", "bmt.on_rank_0(tensorboardX.SummaryWriter)(d)"),
    "another name": ("writer = TBX(d)", "writer = bmt.on_rank_0(TBX)(d)"),
    "with": ("with SummaryWriter(d) as w:\n    w.add_scalar('a', 1)", f"with {ONE}(d) as w:\n    if bmt.rank() == 0:\n        w.add"),
    "an attribute": ("class T:\n    def __init__(self):\n        self.w = SummaryWriter()\nT()", f"self.w = {ONE}()"),
    "handed on": ("fit(net, writer=SummaryWriter(d))", f"fit(net, writer={ONE}(d))"),
    "in a dict": ("logs = {'a': SummaryWriter(d)}", f"logs = {{'a': {ONE}(d)}}"),
    "returned": ("def make(d):\n    return SummaryWriter(d)\nw = make(1)", f"    return {ONE}(d)"),
    "own class": ("class W(SummaryWriter):\n    def log(self, a):\n        self.add_scalar('a', a)\nw = W(d)", "w = bmt.on_rank_0(W)(d)"),
    "aim": ("run = aim.Run(experiment='x')", "run = bmt.on_rank_0(aim.Run)(experiment='x')"),
    "mlflow": ("with mlflow.start_run():\n    mlflow.log_param('a', 1)", "with bmt.on_rank_0(mlflow.start_run)():\n    if bmt.rank() == 0:\n"),
    "wandb": ("wandb.init(project='x')", f"\nwandb.init(project='x', mode=None if {DISABLED})"),
    "a run": ("run = wandb.init()", f"run = wandb.init(mode=None if {DISABLED})"),
    "a mode": ("wandb.init(mode=args.mode)", f"wandb.init(mode=args.mode if {DISABLED})"),
    "a mode chosen": ("wandb.init(mode='online' if net else 'offline')", f"mode=('online' if net else 'offline') if {DISABLED})"),
    "options": ("wandb.init(**options)", "bmt.on_rank_0(wandb.init)(**options)"),
    "swanlab": ("swanlab.init(project='x')", f"swanlab.init(project='x', mode=None if {DISABLED})"),
    "in a guard that goes": (
        "if rank == 0:\n    writer = SummaryWriter(d)\n    state = net.state_dict()", f"\nwriter = {ONE}(d)\nstate"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), CASES.values(), ids=CASES.keys())
def test_one_rank_makes_it(text: str, wanted: str) -> None:
    assert wanted in converted(HEAD + text + "\n" + TRAIN)


REPORTED = {
    "a writer's folder": ("writer = SummaryWriter()\npath = writer.log_dir", "writer.log_dir is rank 0's"),
    "by a method": ("writer = TBX()\npath = writer.get_logdir()", "broadcast_object(writer.get_logdir())"),
    "a run's name": ("wandb.init()\npath = wandb.run.name", "broadcast_object(wandb.run.name)"),
    "methods for all ranks": (
        "class W(SummaryWriter):\n    def save(self, net):\n        torch.save(net.state_dict(), 'x')\nw = W(d)",
        "every rank makes a W",
    ),
}


@pytest.mark.parametrize(("text", "message"), REPORTED.values(), ids=REPORTED.keys())
def test_reported(text: str, message: str) -> None:
    result = convert_text(HEAD + text + "\n" + TRAIN)
    assert any(f.code == "BMT042" and message in f.message for f in result.reported)
    again = convert_text(result.after.decode())
    assert not again.changed and any(f.code == "BMT042" and message in f.message for f in again.reported)


def test_a_helper_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "log.py").write_text(
        "from torch.utils.tensorboard import SummaryWriter\n\n\ndef make(d):\n    return SummaryWriter(d)\n"
    )
    (tmp_path / "train.py").write_text("import log\n" + HEAD + "writer = log.make('runs')\n" + TRAIN)
    found = {r.path.name: r.after.decode() for r in convert_paths(sorted(tmp_path.iterdir()), Options(), [tmp_path])}
    assert f"return {ONE}(d)" in found["log.py"] and "writer = log.make('runs')\n" in found["train.py"]


@pytest.mark.parametrize("made", ["SummaryWriter(d)", "SummaryWriter(log_dir=d)", "TBX(logdir=d)", "TBX('runs/a')"])
@pytest.mark.parametrize("read", ["writer.log_dir", "writer.get_logdir()"])
def test_a_folder_that_is_given_is_known_to_all(made: str, read: str) -> None:
    result = convert_text(HEAD + f"writer = {made}\npath = {read}\n" + TRAIN)
    assert not any("is rank 0's" in said.message for said in result.reported)
