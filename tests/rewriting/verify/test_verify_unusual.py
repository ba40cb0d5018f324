"""The proof with models and factories that do what one would rather not: a verdict every time, and the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewriter.verify.__main__ import main
from rewriter.verify.findings import Report
from rewriter.verify.report import table
from rewriter.verify.run import Settings, verify
from rewriter.verify.tree import leaves

from ..helpers import converted

MODELS = """import os
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(slots=True)
class Output:
    main: torch.Tensor
    other: object


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.give(self.norm(self.inner(x)))

    def give(self, x):
        return x


class Simple(Model):
    def forward(self, x):
        return self.inner(x)


class Slots(Model):
    def give(self, x):
        return Output(x, {"tail": {x.shape, "a", "b", None}})


class Nothing(Model):
    def give(self, x):
        return None


class Integers(Model):
    def give(self, x):
        return x.argmax(-1)


class NotANumber(Model):
    def give(self, x):
        return x * float("nan")


class Parts(Model):
    def forward(self, x):
        for _ in range(2):
            x = self.norm(self.inner(x))
            yield x


class OnlyTrains(Model):
    def give(self, x):
        y = x.exp()
        if not self.training:
            y += 1
        return y


class InPlace(Model):
    def forward(self, x):
        x += 1
        return super().forward(x)


def made(kind, batch=4):
    return kind(), (torch.randn(batch, 4),)


def plain(): return made(Model)
def slots(): return made(Slots)
def nothing(): return made(Nothing)
def integers(): return made(Integers)
def not_a_number(): return made(NotANumber)
def parts(): return made(Parts)
def in_place(): return made(InPlace)
def only_trains(): return made(OnlyTrains)
def few(): return made(Simple, 2)


def counted():
    return Integers(), (torch.randn(4, 4),), lambda out: out.float().sum()


def prints():
    print("noise")
    print("noise", file=sys.stderr)
    os.write(1, b"noise")
    return made(Model)


def frozen():
    model, inputs = made(Model)
    return model.requires_grad_(False), inputs


def raises():
    raise ValueError("no such data")


def exits():
    sys.exit("enough")


def dies():
    os._exit(3)


def hangs():
    time.sleep(1000)
"""


def check(
    folder: Path, factory: str, ranks: tuple[int, ...] = (1,), changed: str | None = None, timeout: float = 60
) -> tuple[Report, str]:
    for name, text in (("original", MODELS), ("converted", changed or converted(MODELS))):
        (folder / name).mkdir()
        (folder / name / "model.py").write_text(text)
    settings = Settings(
        folder / "original", folder / "converted", f"model:{factory}", ranks, device="cpu", timeout=timeout,
        keep=folder / "kept",
    )  # fmt: skip
    report = verify(settings)
    return report, "\n".join(table(report))


@pytest.mark.long
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("raises", "the original raised ValueError: no such data"),
        ("exits", "the process ended"),
        ("dies", "the process ended"),
        ("absent", "has no attribute 'absent'"),
        ("frozen", "does not require grad"),
        ("nothing", "let the factory return a function that does"),
        ("integers", "let the factory return a function that does"),
        ("counted", "does not require grad"),
        ("not_a_number", "nothing was compared: outputs"),
    ],
)
def test_what_shows_nothing_fails(factory: str, message: str, tmp_path: Path) -> None:
    report, text = check(tmp_path, factory)
    assert not report.held and text.endswith("NOT shown to be the same model")
    assert message in text


def test_what_hangs_ends(tmp_path: Path) -> None:
    report, text = check(tmp_path, "hangs", timeout=3)
    assert not report.held
    assert "no answer within 3 s" in text


@pytest.mark.parametrize(
    "factory", ["slots", *(pytest.param(f, marks=pytest.mark.long) for f in ("plain", "prints", "parts"))]
)
def test_what_is_only_unusual_holds(factory: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report, text = check(tmp_path, factory)
    assert report.held, text
    assert capfd.readouterr() == ("", "")


def test_what_is_skipped_is_said(tmp_path: Path) -> None:
    report, text = check(tmp_path, "in_place")
    assert report.held, text
    assert "the original cannot be run with inputs that need gradients: a leaf Variable" in text


@pytest.mark.long
def test_gradients_in_evaluation_mode_are_not_needed(tmp_path: Path) -> None:
    report, text = check(tmp_path, "only_trains")
    assert report.held, text
    assert "the original cannot be trained in evaluation mode: RuntimeError: one of the variables" in text
    assert ("train", "gradients") in {(row.phase, row.what) for row in report.rows if row.verdict == "equal"}


@pytest.mark.long
def test_more_ranks_than_examples(tmp_path: Path) -> None:
    report, text = check(tmp_path, "few", ranks=(3,))
    assert report.held, text
    assert "the inputs' first dimension does not split into 3" in text


@pytest.mark.long
@pytest.mark.parametrize(
    ("factory", "before", "after", "where"),
    [
        ("slots", '"tail": {x.shape, "a"', '"tail": {x.shape, "c"', ("gradients", "outputs")),
        ("plain", "self.calls += 1", "self.calls += 2", ("train", "buffers")),
        ("plain", "def give(self, x):\n        return x\n", "def give(self, x):\n        return x.detach()\n", None),
        (
            "plain",
            "return self.give(self.norm(self.inner(x)))",
            "try:\n            raise OSError\n        except OSError:\n            return self.give(self.inner(x))",
            ("evaluate", "outputs"),
        ),
    ],
    ids=["slots", "buffers", "detached", "swallowed exception"],
)
def test_planted_faults(factory: str, before: str, after: str, where: tuple[str, str] | None, tmp_path: Path) -> None:
    text = converted(MODELS)
    assert before in text
    report, _ = check(tmp_path, factory, changed=text.replace(before, after, 1))
    assert not report.held
    differing = {(row.phase, row.what) for row in report.rows if row.verdict in ("differs", "error")}
    assert (where or ("gradients", "run")) in differing


def test_the_table_goes_from_what_is_built_to_checkpoints(tmp_path: Path) -> None:
    report, _ = check(tmp_path, "plain", ranks=(2, 1))
    phases = list(dict.fromkeys(row.phase for row in report.rows if row.ranks == 2))
    assert phases[:6] == ["build", "gradients", "steps", "train", "split", "evaluate"]
    assert all("checkpoint" in phase for phase in phases[6:]) and len(phases) == 8
    assert [row.ranks for row in report.rows] == sorted((row.ranks for row in report.rows), reverse=True)


def test_sets_are_compared_by_what_they_hold() -> None:
    assert leaves({"b", "a"}) == leaves({"a", "b"})
    assert leaves({torch.Size([2])}) != leaves({torch.Size([3])})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "1,two"], "'two' is not a number above 0"),
        (["--ranks", "0"], "'0' is not a number above 0"),
        (["--steps", "0"], "'0' is not a number above 0"),
    ],
)
def test_wrong_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), str(tmp_path), "model:plain", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path), str(tmp_path), "model:plain", "--keep", str(tmp_path / "file" / "kept")]) == 2
    assert "--keep" in capsys.readouterr().err
