"""Drawing what the meter wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bmtrain import plot


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    lines = [{"step": 10 * n, "loss": 8 / n, "mfu": None, "peak_gib": 2, "note": "x", "ok": True} for n in range(1, 21)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "text",
    ["", "\n", '{"loss": 1}\n', "[1]\n", '{"step": true, "loss": 1}\n', "epoch 1\n{}\n", '{"step": 1}\n', "\x00\xff\n",
     '{"step": 1, "loss": 2}\nhello\n{"step": 2, "loss": 2}\n', '{"step": 1, "loss": "low"}\n', '{"step": null}\n'],
)  # fmt: skip
def test_files_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text, encoding="latin-1")
    assert plot.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"bmt plot: {path}: ") and captured.err.count("\n") == 1


def test_what_cannot_be_drawn(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for options, reason in (
        (["--only", "los"], "there are loss, peak_gib"), (["--out", str(run.with_suffix(".txt"))], "ends in .png"),
        (["--out", str(run / "x.png")], "Not a directory"), ([str(run.parent / "none.jsonl")], "No such file"),
    ):  # fmt: skip
        assert plot.main([str(run), *options]) == 2
        assert reason in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.main([str(run), "--out", str(run.with_suffix(".png"))]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_on_a_terminal(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "66")
    with run.open("a") as file:
        file.write('{"step": 210, "lo')  # a job that ended there
    assert plot.main([str(run)]) == 0
    loss, memory = capsys.readouterr().out.splitlines()
    assert loss == "loss      █▃▂▂▂▁▁▁▁▁  8 to 0.4 (0.4 - 8)" and memory.endswith("▁  2 to 2 (2 - 2)")
    other = run.with_name("other.jsonl")
    other.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": NaN, "speed": 3}\n')
    assert plot.main([str(run), str(other), "--only", "loss"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"loss, {run}") and second == f"loss, {other}  no finite numbers"


def test_runs_in_one_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_text("".join(f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in ((1, 9), (2, 8), (1, 7), (1, 6))))
    assert plot.main([str(run)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"loss, {run}, run 1  ") and first.endswith(" 9 to 8 (8 - 9)")
    assert second.endswith(" 7 to 7 (7 - 7)") and third.startswith(f"loss, {run}, run 3  ")


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_a_picture(run: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    pytest.importorskip("matplotlib")
    out = run.with_suffix(ending)
    assert plot.main([str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: loss, peak_gib\n"
    head = out.read_bytes()[:200]
    assert any(mark in head for mark in (b"\x89PNG", b"<?xml", b"%PDF"))
