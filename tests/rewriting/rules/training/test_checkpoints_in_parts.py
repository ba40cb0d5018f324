# ruff: noqa: E501 - tables of code are easier to read on one line
"""Checkpoints of training in parts, under --unsafe: what stays a plain file and why, then what goes on from what it saved."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_launched, run_script

from ...helpers import converted

SCRIPTS = Path(__file__).parents[2] / "fixtures" / "resuming"
HEAD = """import os
import shutil
import torch
from torch import nn

model = nn.Linear(5, 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
RESUME = """if args.resume:
    checkpoint = torch.load(args.resume)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
"""
LOOP = """for step, x in enumerate(batches):
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
SAVE = """    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path)
"""
WHOLE = HEAD + RESUME + LOOP + SAVE

UNSEEN = "it is not seen that the state of an optimizer is an entry of what is saved"
LEFT = {
    "used otherwise": (WHOLE + "    average(state['model'])\n", "state is used for more than saving"),
    "handed on": (WHOLE + "    upload(state)\n", "state is used for more than saving"),
    "used in the next turn of the loop": (
        HEAD + RESUME + "state = None\n" + LOOP + "    if state is not None:\n        compare(state)\n" + SAVE,
        "state is used for more than saving",
    ),
    "an open file": (HEAD + LOOP + SAVE.replace("path", "file").replace("    torch", "    file = open(path, 'wb')\n    torch"), "an open file"),
    "uploaded": (WHOLE + "    wandb.save(path)\n", "needs a file"),
    "asked for by another name": (HEAD + "found = os.path.isfile(latest_ckpt)\n" + RESUME + LOOP + SAVE, "a folder then"),
    "linked": (WHOLE + "    os.symlink(path, 'latest.pt')\n", "needs a file"),
    "removed by a method": (WHOLE + "    path.unlink()\n", "needs a file"),
    "removed by a method in a function": (
        HEAD + "def prune(folder):\n    for old in sorted(folder.glob('*.pt'))[:-2]:\n        old.unlink()\n\n\n" + RESUME + LOOP + SAVE
        + "    prune(folder)\n", "needs a file",
    ),
    "asked for in a function": (
        HEAD + "def newest(folder):\n    names = [n for n in os.listdir(folder) if n.endswith('.pt')]\n"
        "    return [n for n in names if os.path.isfile(n)][-1]\n\n\n" + RESUME + LOOP + SAVE, "a folder then",
    ),
    "copied with a flag": (WHOLE + "    shutil.copyfile(path, 'b.pt', follow_symlinks=False)\n", "more than paths"),
    "read by a library": (WHOLE + "    timm.models.load_checkpoint(model, path)\n", "reads a file"),
    "entries without names": (HEAD + LOOP + SAVE.replace('"step"', "name()"), "not all named"),
    "entries that are not seen": (HEAD + LOOP + SAVE.replace('"step": step', "**more"), "not seen what more holds"),
    "the dictionary in it used otherwise": (
        HEAD + LOOP + SAVE.replace("torch.save(state, path)", "torch.save({**state, 'x': 1}, path)\n    upload(state)"),
        "state is used for more than saving",
    ),
    "read as bytes": (WHOLE + "    digest = md5(open(path, 'rb').read())\n", "needs a file"),
    "read by a method": (WHOLE + "    digest = md5(path.read_bytes())\n", "needs a file"),
    "its size": (WHOLE + "    print(path.stat().st_size)\n", "needs a file"),
    "copied by a program": (WHOLE + "    subprocess.run(['cp', path, '/mnt'])\n", "needs a file"),
    "states in a dictionary in it": (HEAD + LOOP + "    torch.save({'state': {'optimizer': optimizer.state_dict()}}, path)\n", UNSEEN),
    "states in a list": (HEAD + LOOP + "    torch.save({'optimizers': [optimizer.state_dict()]}, path)\n", UNSEEN),
    "a file of its own": (HEAD + LOOP + "    torch.save(model.state_dict(), 'model.pt')\n    torch.save(optimizer.state_dict(), path)\n", UNSEEN),
    "states of whatever it is given": (
        HEAD + "def save(path, **objects):\n    torch.save({k: v.state_dict() for k, v in objects.items()}, path)\n\n\n"
        + RESUME + LOOP + "    save(path, model=model, optimizer=optimizer)\n", UNSEEN,
    ),
    "another argument": (WHOLE.replace("(state, path)", "(state, path, pickle_protocol=4)"), "more than a dictionary and a path"),
    "one rank alone": (
        HEAD + "def save(state, path):\n    if rank == 0:\n        os.makedirs('x', exist_ok=True)\n        torch.save(state, path)\n\n\n"
        + LOOP + SAVE.replace("torch.save", "save"),
        "one rank alone reaches it",
    ),
}  # fmt: skip


def imported(text: str) -> str:
    return text.replace("import shutil\n", "import shutil\nimport subprocess\nimport timm\nimport wandb\n")


@pytest.mark.parametrize(("text", "why"), LEFT.values(), ids=LEFT.keys())
def test_the_plain_file_stays_and_the_reason_is_said(text: str, why: str) -> None:
    plain, asked = convert_text(imported(text)), convert_text(imported(text), Options(unsafe=True))
    assert plain.changed and not plain.error and not asked.error
    assert b"checkpoint." not in asked.after.replace(b"bmt.save_checkpoint", b"")
    said = [finding.message for finding in asked.reported if finding.code == "BMT045"]
    assert len(said) == 1 and said[0].startswith("the checkpoint stays one plain file: ") and why in said[0], said
    assert not [finding for finding in plain.reported if finding.code == "BMT045"]


METHOD = """class Saver:
    def __init__(self, model, optimizer):
        self.model = model
        self.optimizer = optimizer

    def state(self, step):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}

    def save(self, step, path):
        torch.save(self.state(step), path)


"""
OTHERWISE = {
    "a dictionary in it": SAVE.replace("torch.save(state, path)", "torch.save({**state, 'x': 1}, path)"),
    "a dictionary and more": SAVE.replace("torch.save(state, path)", "torch.save(dict(state, x=1), path)"),
    "words of torch's": SAVE.replace("(state, path)", "(obj=state, f=path)"),
    "words of shutil's": SAVE + "    shutil.copyfile(src=path, dst='best.pt')\n    os.remove(path=path)\n",
    "a method": "    Saver(model, optimizer).save(step, path)\n",
}


@pytest.mark.parametrize("save", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_what_is_saved_is_seen_in_other_spellings(save: str) -> None:
    resume = RESUME.replace("torch.load(", "torch.load(f=")
    after = converted(HEAD + (METHOD if "Saver" in save else "") + resume + LOOP + save, unsafe=True)
    assert "save_sharded(" in after and "load_sharded(f=" in after and ".Sharded(" in after
    assert after.count("state_dict()") == 0 and "args.resume = bmt.checkpoint.newest(args.resume)" in after


UNTOUCHED = {
    "weights alone": HEAD + LOOP + "    torch.save(model.state_dict(), path)\n",
    "weights and a number": HEAD + LOOP + "    torch.save({'model': model.state_dict(), 'step': step}, path)\n",
    "no checkpoint": HEAD + LOOP,
    "weights to begin with": HEAD + "model.load_state_dict(torch.load('weights.pt'))\n" + LOOP,
    "the model itself": HEAD + LOOP + "    torch.save({'model': model, 'optimizer': optimizer}, path)\n",
}


@pytest.mark.parametrize("text", UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_what_is_no_checkpoint_of_training_is_left_alone(text: str) -> None:
    plain, asked = convert_text(text), convert_text(text, Options(unsafe=True))
    assert not [f for f in (*asked.applied, *asked.reported, *plain.hidden) if f.code == "BMT045"]
    assert b".checkpoint." not in asked.after


@pytest.mark.parametrize("name", ["words", "paths", "flags"])
def test_without_unsafe_nothing_changes(name: str) -> None:
    result = convert_text((SCRIPTS / f"{name}.py").read_text())
    assert [finding.code for finding in result.hidden if finding.code == "BMT045"] == ["BMT045"]
    assert b".checkpoint." not in result.after and b"bmt.save_checkpoint(" in result.after
    assert b"torch.load(" in result.after


def test_a_file_that_stays_as_it_is_and_reads_keeps_the_plain_file(tmp_path: Path) -> None:
    train, sample = tmp_path / "train.py", tmp_path / "sample.py"
    train.write_text(WHOLE)
    sample.write_text(f"# bmt: skip-file\n{HEAD}model.load_state_dict(torch.load('x.pt')['model'])\n")
    results = {r.path.name: r for r in convert_paths([train, sample], Options(unsafe=True), [tmp_path])}
    assert b".checkpoint." not in results["train.py"].after
    assert any("sample.py, which stays as it is, reads" in f.message for f in results["train.py"].reported)
    sample.write_text(f"{HEAD}model.load_state_dict(torch.load('x.pt')['model'])\n")
    results = {r.path.name: r for r in convert_paths([train, sample], Options(unsafe=True), [tmp_path])}
    assert (
        b"bmt.checkpoint.load_state_dict(model, bmt.checkpoint.load_sharded('x.pt')['model'])"
        in results["sample.py"].after
    )
    assert b"save_sharded(" in results["train.py"].after


def test_a_line_that_is_skipped_keeps_all_of_it(tmp_path: Path) -> None:
    train, sample = tmp_path / "train.py", tmp_path / "sample.py"
    train.write_text(WHOLE)
    sample.write_text(f"{HEAD}state = torch.load('x.pt')  # bmt: skip[BMT045]\nmodel.load_state_dict(state['model'])\n")
    results = convert_paths([train, sample], Options(unsafe=True), [tmp_path])
    assert not any(b".checkpoint." in result.after for result in results)


NOT_BY_ITSELF = {
    "a question that is not seen": (RESUME.replace("if args.resume", "if wanted()"), "it is not seen what wanted() asks"),
    "a path made of it": (
        RESUME.replace("torch.load(args.resume)", "torch.load(os.path.join(args.resume, 'last.pt'))"), "is made of args.resume",
    ),
    "in a loop": ("for _ in range(2):\n" + "".join(f"    {line}\n" for line in RESUME.splitlines()), "resumes in a loop"),
    "a path of another option": (
        RESUME.replace("torch.load(args.resume)", "torch.load(args.path)"), "what is loaded is told by args.path",
    ),
    "asked for elsewhere": ("def start(args):\n    if not args.resume:\n        shutil.rmtree('runs')\n\n\n" + RESUME, "asks for args.resume, too"),
}  # fmt: skip


@pytest.mark.parametrize(("resume", "why"), NOT_BY_ITSELF.values(), ids=NOT_BY_ITSELF.keys())
def test_what_does_not_go_on_by_itself_is_said(resume: str, why: str) -> None:
    result = convert_text(HEAD + resume + LOOP + SAVE, Options(unsafe=True))
    assert b"save_sharded" in result.after and b"newest" not in result.after
    said = [f.message for f in result.reported if f.code == "BMT045"]
    assert len(said) == 1 and "does not go on by itself" in said[0] and why in said[0], said


def test_it_hears_of_the_restart_before_anything_asks() -> None:
    text = HEAD + "if not args.resume:\n    shutil.rmtree('runs')\n" + RESUME + LOOP + SAVE
    after = converted(text, unsafe=True)
    assert after.index("args.resume = bmt.checkpoint.newest(args.resume)") < after.index("if not args.resume")


def steps(output: str) -> dict[int, str]:
    """The last that was said of each step."""
    return {int(number): rest for number, rest in re.findall(r"^step (\d+) (.*)$", output, re.M)}


def assert_near(found: dict[int, str], expected: dict[int, str], limit: float = 5e-6) -> None:
    assert found.keys() == expected.keys()
    for number, text in expected.items():
        words = zip(found[number].split(), text.split(), strict=True)
        assert all(a == b or float(a) == pytest.approx(float(b), abs=limit) for a, b in words), (
            number,
            found,
            expected,
        )


class Job:
    """A script of the fixtures, as it is and converted."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        names = [name, *(["misc"] if name == "helpers" else [])]
        (folder / "plain").mkdir()
        (folder / "converted").mkdir()
        for one in names:
            (folder / "plain" / f"{one}.py").write_text((SCRIPTS / f"{one}.py").read_text())
        paths = sorted((folder / "plain").glob("*.py"))
        for result in convert_paths(paths, Options(unsafe=True, tensor_parallel=name == "split"), [folder / "plain"]):
            assert not result.error, result.error
            (folder / "converted" / result.path.name).write_bytes(result.after)

    def run(
        self, side: str, *arguments: str, ranks: int = 0, restarts: int = 0, die_at: int | None = None, tp_size: int = 1
    ) -> tuple[int, str]:
        script, folder = self.folder / side / f"{self.name}.py", self.folder / side
        env = {"BMTRAIN_TP_SIZE": str(tp_size), **({} if die_at is None else {"DIE_AT": str(die_at)})}
        if die_at is None and not restarts:
            done = run_script(script, *arguments, ranks=ranks or 1, folder=folder, env=env)
            return max(one.returncode for one in done), "".join(one.stdout + one.stderr for one in done)
        ended = run_launched(script, *arguments, ranks=ranks or 1, restarts=restarts, folder=folder, env=env)
        return ended.returncode, ended.stdout


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("words", "helpers", "flags")]


@pytest.mark.parametrize("name", ["paths", *LONG])
def test_after_a_death_it_goes_on_by_itself(tmp_path: Path, name: str) -> None:
    job = Job(name, tmp_path)
    code, output = job.run("plain")
    expected = steps(output)
    assert code == 0 and len(expected) == 6, output
    code, output = job.run("converted", ranks=2, restarts=1, die_at=3)
    assert code == 0 and "started again: going on from" in output, output
    assert_near(steps(output), expected)
    assert len(re.findall("^step [01] ", output, re.M)) == 2  # it did not begin anew


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("paths", ["--resume", "ckpt/checkpoint_3.pth.tar"], marks=pytest.mark.long),
        pytest.param("words", ["--resume"], marks=pytest.mark.long),
        pytest.param("helpers", ["--resume", "out/checkpoint-2.pth"], marks=pytest.mark.long),
        pytest.param("flags", ["--resume"], marks=pytest.mark.long),
    ],
)
def test_it_goes_on_where_it_is_told_with_any_number_of_ranks(tmp_path: Path, name: str, options: list[str]) -> None:
    job = Job(name, tmp_path)
    expected = steps(job.run("plain")[1])
    code, first = job.run("converted", ranks=2, die_at=3)
    assert code != 0 and sorted(steps(first)) == [0, 1, 2], first
    saved = tmp_path / "converted"
    copies = {1: tmp_path / "again", 2: saved}
    subprocess.run(["cp", "-r", saved, copies[1]], check=True)
    for ranks, folder in copies.items():
        code, output = job.run(folder.name, *options, ranks=ranks)
        assert code == 0 and 0 not in steps(output), output
        assert_near({**steps(first), **steps(output)}, expected)


@pytest.mark.long
def test_a_plain_file_of_before_is_read_too(tmp_path: Path) -> None:
    job = Job("paths", tmp_path)
    expected = steps(job.run("plain")[1])
    shutil.rmtree(tmp_path / "plain" / "ckpt")  # the newest of them would stay, and the others go
    code, first = job.run("plain", die_at=3)
    assert code != 0
    (tmp_path / "plain" / "ckpt").rename(tmp_path / "converted" / "ckpt")
    code, output = job.run("converted", "--resume", "ckpt/checkpoint_3.pth.tar", ranks=2)
    assert code == 0 and 0 not in steps(output), output
    assert_near({**steps(first), **steps(output)}, expected)


@pytest.mark.parametrize(("options", "limit"), [([], 2e-5), pytest.param(["--amp"], 0.02, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("ranks", "tp_size"), [(1, 1), *(pytest.param(*one, marks=pytest.mark.long) for one in [(2, 1), (4, 2), (4, 4)])]
)
def test_split_layers_go_on_split_otherwise(
    tmp_path: Path, options: list[str], limit: float, ranks: int, tp_size: int
) -> None:
    job = Job("split", tmp_path)
    expected = steps(job.run("plain", *options)[1])
    code, first = job.run("converted", *options, ranks=2, tp_size=2, die_at=3)
    assert code != 0 and sorted(steps(first)) == [0, 1, 2], first
    code, output = job.run("converted", *options, "--resume", "out/last.pt", ranks=ranks, tp_size=tp_size)
    assert code == 0 and sorted(steps(output)) == [3, 4, 5], output
    assert_near({**steps(first), **steps(output)}, expected, limit)
