"""Names that the user mistypes: rules, stacks, settings. Nothing is converted, and the nearest right name is said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rewriter.cli import main
from rewriter.command import _codes

MODEL = """import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        self.rest = nn.ModuleDict(dict(inner=nn.ModuleList([nn.Linear(2, 2)])))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
"""
WRONG = {
    "another number": (["--select", "BMT999"], "--select: no rule BMT999; did you mean BMT0"),
    "a digit more": (["--ignore", "BMT0001"], "--ignore: no rule BMT0001; did you mean BMT001?"),
    "one of several": (["--select", "BMT001,BMT002", "--select", "BMT01,BMT0O3"], "no rule BMT0O3; did you mean BMT0"),
    "another tool's": (["--ignore", "E501"], "--ignore: no rule E501; --explain lists the rules"),
    "a name for a code": (["--select", "block_list"], "--select: no rule BLOCK_LIST"),
    "nothing": (["--select", ""], "--select: names no rule"),
    "commas alone": (["--ignore", " , "], "--ignore: names no rule"),
    "a glob": (["--select", "BMT*"], "--select: no rule BMT*; did you mean BMT0"),
    "all left out": (["--ignore", "BMT"], "leave no rule"),
    "chosen and left out": (["--select", "BMT003", "--ignore", "BMT00"], "leave no rule"),
    "a stack": (["--blocks", "Net.blcks"], "--blocks: no list of modules Net.blcks here; did you mean Net.blocks?"),
    "a class": (["--blocks", "Nett.blocks"], "did you mean Net.blocks?"),
    "one stack of two": (["--blocks", "Net.blocks,Net.rest.iner"], "did you mean Net.rest.inner?"),
    "a glob of stacks": (["--blocks", "Encoder.*"], "no list of modules Encoder.* here"),
    "an attribute that is no list": (["--blocks", "Net.forward"], "no list of modules Net.forward here"),
    "no processes": (["--jobs", "0"], "--jobs: 0 is not a number above 0"),
    "steps of no run": (["--steps", "3"], "--steps says how --prove is done"),
    "ranks of no comparison": (["--ranks", "1,2"], "--ranks says how --verify or --prove is done"),
    "a limit of no run": (["--timeout", "0"], "--timeout says how --prove is done"),
    "a report of no kind": (["--report", "out.txt"], "a report ends in .html, .json, .md or .sarif"),
}


@pytest.mark.parametrize(("options", "error"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("mode", ["--check", "--write"])
def test_an_unknown_name_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], error: str, mode: str
) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    assert main([str(tmp_path), mode, *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("bmt-convert: ") and shown.err.count("\n") == 1 and error in shown.err
    assert not shown.out and (tmp_path / "model.py").read_text() == MODEL


@pytest.mark.parametrize(
    "options",
    [
        ["--select", "bmt003"],
        ["--select", "BMT00,BMT02"],
        ["--blocks", "Net.blocks"],
        ["--blocks", "blocks"],
        ["--blocks", "*.blocks"],
        ["--blocks", "Net.rest.inner,blocks"],
    ],
)
def test_known_names(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    assert main([str(tmp_path), "--check", "--blocks", "Net.blocks", *options]) == 1


SETTINGS = {
    'select = ["BMT998"]': "pyproject.toml, select: no rule BMT998; did you mean BMT0",
    'ignore = ["BMT001", "BMT0020"]': "pyproject.toml, ignore: no rule BMT0020; did you mean BMT0",
    'blocks = ["Net.block"]': "no list of modules Net.block here; did you mean Net.blocks?",
    'ignored = ["BMT001"]': "unknown key 'ignored' in [tool.bmt-convert]; did you mean ignore?",
    "ignore = [1]": "'ignore' in [tool.bmt-convert] must be a list of strings",
    "exclude = [[]]": "'exclude' in [tool.bmt-convert] must be a list of strings",
    "jobs = true": "'jobs' in [tool.bmt-convert] must be a whole number",
    "jobs = 0": "'jobs' in [tool.bmt-convert] must be above 0",
    'select = "BMT001"': "'select' in [tool.bmt-convert] must be a list of strings",
}


@pytest.mark.parametrize(("line", "error"), SETTINGS.items(), ids=SETTINGS.keys())
def test_an_unknown_name_in_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, error: str
) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "pyproject.toml").write_text(f"[tool.bmt-convert]\n{line}\n")
    assert main([str(tmp_path / "model.py"), "--check"]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("table", ["bmt_convert", "BMT-Convert", "bmtconvert", "bmtrain-convert"])
def test_a_table_by_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "pyproject.toml").write_text(f"[tool.converter]\nx = 1\n[tool.{table}]\nignore = ['BMT001']\n")
    assert main([str(tmp_path / "model.py"), "--check"]) == 2
    assert f"a table [tool.{table}]; did you mean [tool.bmt-convert]?" in capsys.readouterr().err


@pytest.mark.parametrize("code", ["BMT0001", "bmt001", "BMT00", "BMT001 BMT003"])
def test_an_unknown_rule_in_a_comment(tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str) -> None:
    """The line would change that its author wanted kept."""
    text = MODEL.replace("class Net(nn.Module):", f"class Net(nn.Module):  # bmt: skip[{code}]")
    (tmp_path / "model.py").write_text(text)
    assert main([str(tmp_path), "--write"]) == 2
    assert f"model.py:5: skip[{code}]: no such rule; did you mean BMT0" in capsys.readouterr().err
    assert (tmp_path / "model.py").read_text() == text


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--select", "BMT999"], ["--blocks", "Net.blcks"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(MODEL))
        assert main(["-", *options]) == 2
        assert not capsys.readouterr().out


def test_the_codemod_knows_the_same_names() -> None:
    assert _codes("bmt003,BMT02") == ("BMT003", "BMT02")
    with pytest.raises(Exception, match="did you mean BMT001"):
        _codes("BMT0001")


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [("test", False), ("tests/", True), ("./tests", True), ("tests", True), ("tests/*", True), ("t*.py", True)],
)
def test_a_pattern_that_fits_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, fits: bool
) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("model.py", "tests/try.py"):
        (tmp_path / name).write_text(MODEL)
    assert main([str(tmp_path), "--check", "--exclude", pattern]) == 1
    shown = capsys.readouterr()
    assert shown.err == ("" if fits else f"bmt-convert: --exclude {pattern}: nothing here has such a name\n")
    assert ("try.py" in shown.out) is not fits
    assert main([str(tmp_path / "model.py"), "--check", "--exclude", pattern]) == 1  # as a hook gives files
    assert capsys.readouterr().err == ""
