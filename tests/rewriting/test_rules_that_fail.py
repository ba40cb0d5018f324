"""A rule that fails: one line that says at what, and nothing of the project is converted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rewriter import convert, plan, portions
from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.cli import main
from rewriter.rules import FIRST, RULES
from rewriter.types import Finding

MODEL = "import torch\n\n\nclass Model(torch.nn.Module):\n    pass\n"
TRAIN = """import torch
from model import Model

model = Model(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    loss = model(torch.ones(2, 4)).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def _fails_at(name: str, monkeypatch: pytest.MonkeyPatch, code: str = "BMT024", first: bool = False) -> None:
    """Let a rule fail at a file, after it has found something."""

    def broken(rule: object) -> object:
        find = rule.find  # type: ignore[attr-defined]

        def failing(file: File, facts: Facts) -> Iterator[Finding]:
            yield from find(file, facts)
            if file.path.name == name:
                raise KeyError("of\na rule")

        return replace(rule, find=failing)  # type: ignore[type-var]

    made = tuple(broken(rule) if rule.code == code else rule for rule in (FIRST if first else RULES))
    monkeypatch.setattr(plan, "FIRST" if first else "RULES", made)


def _says_so(root: Path, capsys: pytest.CaptureFixture[str], name: str, what: str) -> None:
    before = {path: path.read_bytes() for path in root.iterdir()}
    assert main([str(root), "--write"]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"bmt-convert: {root / name}: {what} failed (KeyError: 'of\\na rule' at ")
    assert "please report this" in line and f"--exclude {name} leaves" in line
    assert output.out == ""
    assert {path: path.read_bytes() for path in root.iterdir()} == before


@pytest.mark.parametrize("name", ["model.py", "train.py"])
def test_names_the_file_the_rule_and_the_exception(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails_at(name, monkeypatch)
    _says_so(project, capsys, name, "rule BMT024")


def test_in_portions(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(portions, "WHOLE", 10)
    monkeypatch.setattr(portions, "PORTION", 10)
    _fails_at("train.py", monkeypatch)
    _says_so(project, capsys, "train.py", "rule BMT024")


def test_a_rule_that_makes_an_ordinary_loop_first(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "train.py").write_text("import accelerate\n" + TRAIN)
    _fails_at("train.py", monkeypatch, FIRST[0].code, first=True)
    _says_so(project, capsys, "train.py", f"rule {FIRST[0].code}")


def test_changes_that_cannot_be_made(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = convert.apply_plan

    def failing(file: File, planned: plan.Plan) -> object:
        if file.path.name == "train.py":
            planned = replace(planned, changes=(*planned.changes, object()))  # type: ignore[arg-type]
        return made(file, planned)

    monkeypatch.setattr(convert, "apply_plan", failing)
    before = (project / "model.py").read_bytes()
    assert main([str(project), "--write"]) == 2
    assert "train.py: making the changes failed (" in capsys.readouterr().err
    assert (project / "model.py").read_bytes() == before


def test_the_file_can_be_left_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fails_at("train.py", monkeypatch)
    main([str(project), "--write", "--exclude", "train.py"])
    assert "DistributedModule" in (project / "model.py").read_text()
    assert (project / "train.py").read_text() == TRAIN
