"""A whole script, run as it is and converted: what differs is named, and nothing is when nothing does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewriter import cli
from rewriter.verify.script import compare
from rewriter.verify.script.prove import Report, Settings, prove
from rewriter.verify.script.report import text
from rewriter.verify.script.runs import Command, Host
from rewriter.verify.script.text import Origins, compare_lines

from ...helpers import converted

SCRIPT = """import json
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(20, 6)
y = x.sum(1, keepdim=True).sin()
loader = DataLoader(TensorDataset(x[:16], y[:16]), batch_size=4, shuffle=True)
val_loader = DataLoader(TensorDataset(x[16:], y[16:]), batch_size=4)
history = []
for epoch in range(2):
    model.train()
    for a, b in loader:
        loss = nn.functional.mse_loss(model(a), b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print("loss", loss.item())
    model.eval()
    with torch.no_grad():
        for a, b in val_loader:
            print("val", nn.functional.mse_loss(model(a), b).item())
    history.append(epoch)
    with open("history.json", "w") as file:
        json.dump(history, file)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "model.pt")
"""
HEAD = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
x = torch.randn(11, 6)
x[:, 1] = torch.arange(11)
"""
LOOP = """for (a,) in DataLoader(TensorDataset(x{samples}), batch_size=4):
    {loss}
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
LOADER = "bmt.shard_loader(DataLoader(TensorDataset(x[:16], y[:16]), batch_size=4, shuffle=True))"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


def check(
    host: Host,
    folder: Path,
    original: str,
    changed: str = "",
    ranks: tuple[int, ...] = (2,),
    steps: int | None = 3,
    timeout: float = 60.0,
) -> Report:
    for name, code in (("original", original), ("converted", changed or converted(original))):
        (folder / name).mkdir()
        (folder / name / "train.py").write_text(code)
    command = Command((("train.py",),), steps, timeout)
    report = prove(Settings(folder / "original", folder / "converted", command, ranks), host)
    print("\n".join(text(report)))
    return report


def fault(*changes: tuple[str, str]) -> str:
    code = converted(SCRIPT)
    for before, after in changes:
        assert before in code, code
        code = code.replace(before, after, 1)
    return code


def line_of(finding: compare.Finding) -> str:
    """The line of the original that is named."""
    name, number = finding.at.split(":")
    assert name == "train.py"
    return SCRIPT.splitlines()[int(number) - 1].strip()


def kinds(report: Report) -> list[str]:
    return [finding.kind for finding in report.findings]


def test_a_script_holds(host: Host, tmp_path: Path) -> None:
    report = check(host, tmp_path, SCRIPT, ranks=(1, 2), steps=None)
    assert report.held, report.findings
    for outcome in report.outcomes:
        assert (outcome.losses, outcome.gradients, outcome.steps) == (8, 8, 8)
        assert (outcome.weights, outcome.samples) == (32, 32)
        assert (outcome.lines, outcome.files) == (10, 2)
        assert outcome.first_step is not None
    assert not report.split.kind and report.split.halves


@pytest.mark.parametrize(
    "forward",
    [
        "with torch.autocast('cpu'):\n            z = model(a)\n        loss = F.mse_loss(z.float(), b)",
        "model.bfloat16()\n        loss = F.mse_loss(model(a.bfloat16()).float(), b)",
    ],
)
def test_low_precision_is_seen_where_the_loss_has_none(host: Host, tmp_path: Path, forward: str) -> None:
    """Numbers may differ by a hundredth, though ``backward`` runs behind ``autocast`` on a loss in fp32."""
    script = SCRIPT.replace("loss = nn.functional.mse_loss(model(a), b)", forward, 1)
    script = script.replace("nn.functional", "F")
    script = script.replace("import torch\n", "import torch\nimport torch.nn.functional as F\n", 1)
    script = script.replace("val_loader:", "[]:")
    changed = converted(script).replace("bmt.sum_loss(loss)", "(1.002 * bmt.sum_loss(loss))", 1)
    assert "1.002" in changed
    report = check(host, tmp_path, script, changed, ranks=(1,), steps=2)
    assert not {compare.PRINTED, compare.WEIGHTS} & set(kinds(report)), report.findings


def test_data_that_is_not_shared(host: Host, tmp_path: Path) -> None:
    report = check(host, tmp_path, SCRIPT, fault((LOADER, LOADER.removeprefix("bmt.shard_loader(")[:-1])))
    assert kinds(report)[0] == compare.DATA
    assert line_of(report.findings[0]) == "loss.backward()"


@pytest.mark.long
def test_lines_and_files_of_every_rank(host: Host, tmp_path: Path) -> None:
    changed = fault(('bmt.print_rank("loss"', 'print("loss"'), ("if bmt.rank() == 0:", "if True:"))
    report = check(host, tmp_path, SCRIPT, changed, steps=None)
    found = {finding.kind: finding for finding in report.findings}
    assert set(found) == {compare.PRINTED, compare.WRITTEN}
    assert "history.json" in found[compare.WRITTEN].message
    assert line_of(found[compare.PRINTED]) == 'print("loss", loss.item())'


@pytest.mark.long
def test_first_weights(host: Host, tmp_path: Path) -> None:
    report = check(host, tmp_path, SCRIPT, fault(("seed=1", "seed=2")))
    assert kinds(report)[0] == compare.INITIAL


@pytest.mark.long
def test_a_step_of_another_size(host: Host, tmp_path: Path) -> None:
    report = check(host, tmp_path, SCRIPT, fault(("lr=1e-2", "lr=2e-2")))
    assert kinds(report)[0] == compare.WEIGHTS
    assert "the gradients are the same" in report.findings[0].message


@pytest.mark.long
def test_an_original_that_shares_its_batches(host: Host, tmp_path: Path) -> None:
    """Compared with itself on as many processes: 2 of 2 samples, not 1 of 4."""
    head = HEAD.replace("torch.manual_seed(1)", "dist.init_process_group('gloo')\ntorch.manual_seed(1)")
    head = head.replace("import torch\n", "import torch\nimport torch.distributed as dist\n", 1)
    loop = """model = nn.parallel.DistributedDataParallel(model)
data = TensorDataset(x[:8])
sampler = torch.utils.data.distributed.DistributedSampler(data)
for (a,) in DataLoader(data, batch_size=2, sampler=sampler):
    loss = model(a).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    torch.save(model.module.state_dict(), "model.pt")
"""
    report = check(host, tmp_path, head + loop, steps=None)
    assert report.held, report.findings
    (outcome,) = report.outcomes
    assert (outcome.losses, outcome.samples, outcome.steps, outcome.tensors) == (2, 8, 2, 4)


@pytest.mark.long
def test_a_manager_that_trains_nothing(host: Host, tmp_path: Path) -> None:
    report = check(host, tmp_path, SCRIPT, fault(("optim_manager.step()", "pass")), steps=1)
    first = report.outcomes[0].first()
    assert first is not None and first.kind == compare.WEIGHTS
    assert line_of(first) == "optimizer.step()"


def test_a_rank_that_leaves_early(host: Host, tmp_path: Path) -> None:
    early = "optim_manager.step()\n        if bmt.rank() == 1:\n            break"
    report = check(host, tmp_path, SCRIPT, fault(("optim_manager.step()", early)), timeout=25)
    assert kinds(report)[0] in (compare.BRANCH, compare.STALLED)
    # Each rank's place: from the runtime, or from where it waits if that is not quick enough.
    assert any("rank 0 waits in" in f.message or "Now rank 0 is in" in f.message for f in report.findings)


@pytest.mark.long
def test_a_rank_that_crashes(host: Host, tmp_path: Path) -> None:
    crash = "optim_manager.step()\n        assert bmt.rank() == 0, 'too far'"
    report = check(host, tmp_path, SCRIPT, fault(("optim_manager.step()", crash)))
    crashed = [finding for finding in report.findings if finding.kind == compare.CRASHED]
    assert "rank 1: AssertionError: too far" in crashed[0].message
    assert line_of(crashed[0]) == "optimizer.step()"
    assert len(crashed) == 1


@pytest.mark.long
def test_an_original_that_crashes(host: Host, tmp_path: Path) -> None:
    report = check(host, tmp_path, SCRIPT + "raise ValueError('no')\n", steps=None)
    assert not report.held
    assert [(f.kind, f.at) for f in report.findings] == [(compare.CRASHED, f"train.py:{SCRIPT.count(chr(10)) + 1}")]


LOSSES = {
    "uneven last batch": ("", "loss = model(a).square().mean()", compare.COUNTS),
    "mask": (
        "[:4]",
        "mask = a[:, 1:2] < 2.5; loss = (model(a).square().mean(1, keepdim=True) * mask).sum() / mask.sum()",
        compare.COUNTS,
    ),
    "items compared": ("[:8]", "z = model(a); loss = (z @ z.T).logsumexp(1).mean()", compare.ACROSS),
    "sum": ("[:8]", "loss = model(a).square().sum() + 0 * model(a).mean()", compare.SUM),
    "random numbers": ("[:8]", "loss = (model(a + torch.randn_like(a))).square().mean()", compare.RANDOM),
}


@pytest.mark.parametrize("name", [n if n == "sum" else pytest.param(n, marks=pytest.mark.long) for n in LOSSES])
def test_losses(host: Host, tmp_path: Path, name: str) -> None:
    samples, loss, kind = LOSSES[name]
    report = check(host, tmp_path, HEAD + LOOP.format(samples=samples, loss=loss), steps=None)
    assert kinds(report)[0] == kind
    assert report.findings[0].at.startswith("train.py:")


@pytest.mark.long
def test_an_original_that_draws_its_seed(host: Host, tmp_path: Path) -> None:
    loop = LOOP.format(samples="[:8]", loss="loss = model(a + shift).square().mean()")
    shift = "import os\nshift = int.from_bytes(os.urandom(2), 'big') / 65536\n"
    report = check(host, tmp_path, HEAD + shift + loop)
    assert kinds(report)[0] == compare.UNREPEATED


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    loop = LOOP.format(samples="[:8]", loss="loss = model(shift(a)).square().mean()")
    loop = "if args.resume:\n    model.load_state_dict(torch.load('model.pt'))\n" + loop
    loop += "torch.save(model.state_dict(), 'model.pt')\n"
    script = "import argparse\nfrom near import shift\n" + HEAD.replace("lr=1e-2", "lr=args.lr").replace(
        "torch.manual_seed(1)",
        "parser = argparse.ArgumentParser()\nparser.add_argument('--lr', type=float)\n"
        "parser.add_argument('--resume', action='store_true')\nargs = parser.parse_args()\n"
        "assert open('data.txt').read() == 'here'\ntorch.manual_seed(1)",
    )
    (project / "scripts" / "train.py").write_text(script + loop)
    (project / "scripts" / "near.py").write_text("def shift(a):\n    return a + 1\n")
    (project / "data.txt").write_text("here")
    report = tmp_path / "proof.json"
    command = "scripts/train.py --lr 0.1"
    commands = ["--prove", command, "--prove", f"{command} --resume"]
    arguments = [str(project), *commands, "--ranks", "2", "--report", str(report)]
    assert cli.main(arguments) == 0, capsys.readouterr().out
    assert "does what the original does on 2 ranks" in capsys.readouterr().out.splitlines()[-1]
    found = json.loads(report.read_text())
    (run,) = found["runs"]
    assert found["held"] and (run["losses"], run["samples"], run["steps"], run["tensors"]) == (4, 16, 4, 4)
    assert sorted(path.name for path in project.rglob("*") if path.is_file()) == ["data.txt", "near.py", "train.py"]


def test_a_script_that_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "from accelerate import Accelerator\naccelerator = Accelerator(**options)\n" + HEAD
    (tmp_path / "train.py").write_text(script + LOOP.format(samples="", loss="loss = model(a).mean()"))
    assert cli.main([str(tmp_path), "--prove", "train.py"]) == 3
    shown = capsys.readouterr().out
    assert "not converted" in shown and "NOT shown" in shown.splitlines()[-1]
    assert cli.main([str(tmp_path), "--prove", "missing.py"]) == 2


def test_origins(tmp_path: Path) -> None:
    changed = fault(("optim_manager.step()", "optim_manager.step()\n        assert bmt.rank() == 0"))
    for name, code in (("original", SCRIPT), ("converted", changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(code)
    origin = Origins(tmp_path / "original", tmp_path / "converted")

    def of(text: str) -> str:
        number = next(n for n, line in enumerate(changed.splitlines(), 1) if text in line)
        return SCRIPT.splitlines()[int(origin(f"train.py:{number}").split(":")[1]) - 1].strip()

    assert of("optim_manager.backward(loss)") == "loss.backward()"
    assert of("assert bmt.rank()") == of("optim_manager.step()") == "optimizer.step()"
    assert of('print_rank("loss"') == 'print("loss", loss.item())'
    assert of("bmt.save_checkpoint").startswith("torch.save(")
    assert origin("other.py:3") == "other.py:3" and origin("") == ""


@pytest.mark.parametrize(
    ("ours", "theirs", "differing"),
    [
        ("loss 0.5012", "loss 0.5013", 0),
        ("loss 0.5012", "loss 0.5018", 1),
        ("loss 1.25e-3", "loss 1.26e-3", 0),
        ("step 12: 3", "step 12: 4", 1),
        ("step 12", "epoch 12", 1),
        ("took 3.2 s, 0.1", "took 9.7 s, 0.1", 0),
        ("[12:30:01] 5 it/s", "[12:31:59] 7 it/s", 0),
        ("Loss: tensor(0.5, grad_fn=<MeanBackward0>)", "Loss: tensor(0.5, grad_fn=<_AllReduceBackward>)", 0),
        ("Loss: tensor(0.5, grad_fn=<MeanBackward0>)", "Loss: tensor(0.7, grad_fn=<_AllReduceBackward>)", 1),
        ("loss nan", "loss 1.0", 1),
        ("layer1 0.5", "layer2 0.5", 1),
    ],
)
def test_lines(ours: str, theirs: str, differing: int) -> None:
    assert len(compare_lines([ours], [theirs], 1e-4).different) == differing
