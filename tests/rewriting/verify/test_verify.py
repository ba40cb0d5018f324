"""The proof holds for what the rewriter makes, and for nothing that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewriter import cli
from rewriter.verify.__main__ import main
from rewriter.verify.report import as_json, table
from rewriter.verify.run import Report, Settings, verify

from ..helpers import converted

MODEL = """import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inner = nn.Linear(size, size)
        self.drop = nn.Dropout(0.2)

    def forward(self, x, shift, bias, scale=1.0):
        return x + self.drop(torch.tanh(self.inner(x + shift))) * scale + bias


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Layer(6) for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens, shift, bias):
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x, shift, bias, scale=0.5)
        return {"logits": self.head(x)}


def build():
    return Model(), (torch.randint(11, (4, 5)), torch.randn(4, 5, 6), torch.randn(4, 5, 6))


def build_alone():
    return Model()
"""
CALL = "x = self.layers(x, shift, bias, scale=0.5)"


def check(
    folder: Path, changed: str, original: str = MODEL, ranks: tuple[int, ...] = (2,), factory: str = "build"
) -> Report:
    for name, text in (("original", original), ("converted", changed)):
        (folder / name).mkdir()
        (folder / name / "model.py").write_text(text)
    settings = Settings(
        folder / "original", folder / "converted", f"model:{factory}", ranks, device="cpu", timeout=60,
        keep=folder / "kept",
    )  # fmt: skip
    return verify(settings)


def fault(before: str, after: str) -> str:
    text = converted(MODEL)
    assert before in text
    return text.replace(before, after)


def differing(report: Report) -> set[tuple[str, str]]:
    return {(row.phase, row.what) for row in report.rows if row.verdict == "differs"}


def test_conversion_holds(tmp_path: Path) -> None:
    report = check(tmp_path, converted(MODEL), ranks=(1, 2))
    assert report.held, "\n".join(table(report))
    assert not report.kept
    assert {row.phase for row in report.rows} >= {"build", "evaluate", "gradients", "train", "split", "steps"}
    assert all(row.comparison.ulp == 0 for row in report.rows if row.ranks == 1 and row.phase != "steps")


def test_dropped_keyword(tmp_path: Path) -> None:
    report = check(tmp_path, fault(CALL, "x = self.layers(x, shift, bias)"))
    assert ("evaluate", "outputs") in differing(report)
    assert report.first[2, "evaluate"][0] == "layers.0"
    lines = "\n".join(table(report))
    assert "first module that differs: layers.0" in lines
    assert report.kept is not None and report.kept.exists()
    assert not json.loads(json.dumps(as_json(report)))["held"]


@pytest.mark.long
def test_swapped_argument(tmp_path: Path) -> None:
    report = check(tmp_path, fault(CALL, "x = self.layers(x, bias, shift, scale=0.5)"))
    assert ("evaluate", "outputs") in differing(report)
    assert report.first[2, "evaluate"][0] == "layers.0.inner"


@pytest.mark.long
def test_skipped_block(tmp_path: Path) -> None:
    skipping = "for layer in self.layers[:-1]:\n            x = layer(x, shift, bias, scale=0.5)"
    report = check(tmp_path, fault(CALL, skipping))
    assert ("evaluate", "outputs") in differing(report)
    name, distance = report.first[2, "evaluate"]
    assert name.startswith("layers.2") and distance.why == "is called in the original only"


@pytest.mark.long
def test_untied_weights(tmp_path: Path) -> None:
    tie = "self.head.weight = self.table.weight"
    report = check(tmp_path, fault(tie, "self.head.weight = nn.Parameter(self.table.weight.detach().clone())"))
    assert ("evaluate", "outputs") not in differing(report)
    assert ("gradients", "gradients") in differing(report)


@pytest.mark.long
def test_wrong_reduction_factor(tmp_path: Path) -> None:
    summing = "\nbmt.optim.OptimManager.scale_loss = lambda self, loss: loss * bmt.world_size()\n"
    report = check(tmp_path, converted(MODEL) + summing)
    assert ("gradients", "gradients") in differing(report)
    assert ("train", "gradients") in differing(report)
    assert ("evaluate", "outputs") not in differing(report)


def test_stale_shard(tmp_path: Path) -> None:
    """One rank's part of the weights does not follow the optimizer."""
    stale = """

class Stale(bmt.optim.AdamOptimizer):
    def step(self, *args, **kwargs):
        before = [flat.shard.clone() for flat in flats(self)]
        super().step(*args, **kwargs)
        if bmt.rank() == 1:
            for flat, shard in zip(flats(self), before):
                flat.shard.copy_(shard)


def flats(optimizer):
    return list({id(p._flat): p._flat for g in optimizer.param_groups for p in g["params"]}.values())


bmt.optim.AdamOptimizer = Stale
"""
    report = check(tmp_path, converted(MODEL) + stale)
    assert ("steps", "weights") in differing(report)
    assert ("train", "gradients") not in differing(report)


@pytest.mark.long
def test_parameters_left_whole(tmp_path: Path) -> None:
    report = check(tmp_path, MODEL + "\nNothing = nn.Module\n")
    assert ("build", "sharded") in differing(report)
    assert not report.held


def test_errors_and_emptiness_are_failures(tmp_path: Path) -> None:
    empty = MODEL.replace("return Model(), (", "return nn.Flatten(), (")
    report = check(tmp_path, empty, original=empty, ranks=(1,))
    assert not report.held
    assert "gradients" in report.empty
    assert any("something else was imported" in row.error for row in report.rows)


@pytest.mark.long
def test_an_exception_is_named_and_other_phases_go_on(tmp_path: Path) -> None:
    raising = "if self.training:\n            raise ValueError('only in training')\n        " + CALL
    report = check(tmp_path, fault(CALL, raising), ranks=(1,))
    verdicts = {(row.phase, row.what): row for row in report.rows}
    assert "ValueError: only in training" in verdicts["train", "run"].error
    assert verdicts["gradients", "gradients"].verdict == "equal"
    assert verdicts["the original's checkpoint", "outputs"].verdict == "equal"
    assert not report.held


@pytest.mark.parametrize(
    ("shapes", "expected", "message"),
    [
        (["tokens=4x5:long", "shift=4x5x6", "bias=4x5x6"], 0, "the converted model is the same model"),
        (["tokens=4x5:long"], 1, "give sizes such as --shape shift=2x8 --shape bias=2x8"),
        (["tokens=4xfive"], 1, "write NAME=2x8"),
    ],
)
def test_command_line_and_shapes(
    shapes: list[str], expected: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "model.py").write_text(MODEL)
    (tmp_path / "b" / "model.py").write_text(converted(MODEL))
    options = [item for shape in shapes for item in ("--shape", shape)]
    paths = [str(tmp_path / "a" / "model.py"), str(tmp_path / "b" / "model.py")]
    code = main([*paths, "model:build_alone", "--ranks", "1", "--device", "cpu", *options])
    assert code == expected
    assert message in capsys.readouterr().out


def test_convert_and_verify(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is written in place unless it was shown to be the same."""
    file = tmp_path / "model.py"
    for extra, expected in (("\nassert False\n", 1), ("", 0)):
        file.write_text(MODEL + extra)
        assert cli.main([str(file), "--write", "--verify", "model:build", "--ranks", "1", "-q"]) == expected
        assert ("bmtrain" in file.read_text()) == (expected == 0)
    assert "the converted model is the same model" in capfd.readouterr().out


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path), "model"]) == 2
    assert "MODULE:FACTORY" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "absent"), "model:build"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
