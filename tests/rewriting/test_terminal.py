"""What a terminal shows, with rich and without it; what other programs read is the same with both."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewriter import portions
from rewriter.cli import main
from rewriter.terminal import progress

CODE = """import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            print("[red]", x)
        return x
"""
ESCAPES = re.compile(r"\033\[[0-9;?]*[a-zA-Z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    return Path("net.py")


@pytest.fixture(params=["rich", "no rich"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "rich":
        pytest.importorskip("rich")
    elif request.param == "no rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    yield request.param


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    out, err = Terminal(), Terminal()
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", out)
        patched.setattr("sys.stderr", err)
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def test_what_other_programs_read_is_the_same(
    project: Path, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for color in ("0", "1"):
        monkeypatch.setenv("FORCE_COLOR", color)
        assert main([str(project), "--check"]) == 1
        out, err = capsys.readouterr()
        assert err == "" and "\033" not in out
        assert out.startswith(("net.py:8: BMT003 left: ", "net.py:11: BMT004 left: "))
        assert "\nnet.py:5: BMT001 class Net inherits bmt.DistributedModule\n" in out


def test_a_terminal_sees_at_once_what_is_done(project: Path, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(monkeypatch, ".", "--check", "-q")
    steps = [step.strip() for step in ESCAPES.sub("", err).split("\r")]
    assert code == 1 and out.startswith("1 of 1 file changed")
    told = [step.split("  ")[0].split(" \u2501")[0].split(" \u2578")[0] for step in steps if step]
    if shown == "rich":
        assert told[0] == "looking for files" and "reading" in told and "deciding" in told
        assert err.endswith("\033[2K") and "\033[?25h" in err  # nothing of it stays, and there is a cursor again
    else:
        assert told[:3] == ["looking for files", "reading 0/1", "deciding 0/1"] and steps[-1] == ""


def test_a_terminal_that_can_do_little_gets_lines(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    _, out, err = run(monkeypatch, ".", "--check")
    assert "looking for files" in err and "\033" not in err + out
    assert "\nnet.py:5: BMT001 class Net inherits" in out


def test_a_bar_says_how_long_it_will_take(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rewriter.terminal.EVERY", 0.0)
    with progress(stream) as tell:  # type: ignore[arg-type]
        for number in range(1, 6):
            tell("looking for files", number, 0)
        for number in range(6):
            tell("converting", number, 5)
    text = ESCAPES.sub("", stream.getvalue())
    assert "5/?" in text and "0/5" in text and "5/5" in text and "0:00:00" in text
    assert max(map(len, text.replace("\r", "\n").splitlines())) <= 80


def test_ctrl_c_leaves_no_bar(project: Path, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    def interrupted(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("rewriter.cli.convert_project", interrupted)
    code, _, err = run(monkeypatch, ".", "--write")
    assert code == 130 and ESCAPES.sub("", err).endswith("\nbmt-convert: interrupted; nothing was written\n")


@pytest.mark.parametrize("columns", [15, 58, 59, 200])
def test_findings_fit_the_width_and_lose_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, columns: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(columns))
    main([str(project), "--check"])
    plain = capsys.readouterr().out
    _, out, _ = run(monkeypatch, str(project), "--check")
    if columns < 59:  # beside the longest place, net.py:11, a table has no room
        assert out == plain
        return
    table = ESCAPES.sub("", out)
    assert "\033[33mleft: \033[0m" in out
    assert max(map(len, table.splitlines()[:-3])) <= columns
    assert all(re.search(rf"^{place} ", table, re.M) for place in re.findall(r"^net.py:\d+", plain, re.M))
    assert sorted("".join(table.split()).replace(":", "")) == sorted("".join(plain.split()).replace(":", ""))


def test_colours_as_asked(project: Path, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    for name, value, options, coloured in (
        ("TERM", "xterm", (), True), ("NO_COLOR", "1", (), False), ("NO_COLOR", "1", ("--color", "always"), True),
        ("NO_COLOR", "", ("--color", "never"), False),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
        _, out, err = run(monkeypatch, str(project), *options)
        assert ("\033[32m" in out) == coloured, (name, value, options)
        assert ("\033[33m" in err) == (coloured and shown != "no rich"), (name, value, options)


def test_brackets_are_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    folder = tmp_path / "[bold]"
    folder.mkdir()
    (folder / "[red]net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert "[bold]/[red]net.py:5" in run(monkeypatch, ".", "--check")[1]


def test_portions_are_forked_below_a_bar(project: Path, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    for number in range(4):
        Path(f"m{number}.py").write_text(CODE)
    monkeypatch.setattr(portions, "WHOLE", 10)
    monkeypatch.setattr(portions, "PORTION", 500)
    code, out, err = run(monkeypatch, ".", "--check", "-q", "-j", "2")
    assert code == 1 and out.startswith("5 of 5 files changed") and "5/5" in err


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    said, quiet = io.StringIO(), io.StringIO()
    with progress(said) as tell, progress(quiet, quiet=True) as tell_nobody:
        for number in range(26):
            now = float(number)
            tell("reading", number, 0 if number < 15 else 40)
            tell_nobody("reading", number, 40)
    assert said.getvalue() == "bmt-convert: reading 10\nbmt-convert: reading 20/40\n" and quiet.getvalue() == ""


@pytest.mark.parametrize("never", ["--color=never", "NO_COLOR"])
def test_nothing_is_coloured_where_nobody_wants_it(
    project: Path, shown: str, monkeypatch: pytest.MonkeyPatch, never: str
) -> None:
    options = [never] if never.startswith("-") else []
    _, out, err = run(monkeypatch, str(project), "--check")
    assert ("\033[38" in out + err or "\033[36" in out + err) is (shown == "rich")
    if not options:
        monkeypatch.setenv("NO_COLOR", "1")
    _, out, err = run(monkeypatch, str(project), "--check", *options)
    assert not re.search(r"\033\[(?!0m|1m)[0-9;]+m", out + err)
