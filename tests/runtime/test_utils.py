"""Printing, memory and averages."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import bmtrain as bmt
from bmtrain import debug, utils


def printed() -> tuple[str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as everywhere:
        bmt.print_rank("zero", 0, sep="-")
        bmt.print_rank("one", rank=1, end="!")
    with contextlib.redirect_stdout(io.StringIO()) as memory:
        bmt.see_memory("after the first step")
        bmt.see_memory("again", detail=True)
    return everywhere.getvalue(), memory.getvalue()


def test_print_rank_prints_on_one_rank() -> None:
    (first, memory), (second, quiet) = run_ranks(2, printed)
    assert (first, second) == ("zero-0\n", "one!")
    assert "after the first step" in memory and "GB" in memory and quiet == ""


def test_print_rank_before_initialisation(capsys: pytest.CaptureFixture[str]) -> None:
    utils.print_rank("hello")
    utils.print_rank("nobody", rank=1)
    assert capsys.readouterr().out == "hello\n"


class Writer:
    """A writer of a log that keeps the file's name."""

    def __init__(self, folder: Path, name: str = "log") -> None:
        self.path = folder / name
        self.path.touch(exist_ok=False)

    def add(self, *words: object) -> Path:
        with self.path.open("a") as file:
            print(*words, file=file)
        return self.path

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.add("closed")


USES_OF_A_VALUE: list[Callable[[Any], object]] = [
    str, os.fspath, bool, list, hash, Path, lambda v: f"{v}", lambda v: v / "a", lambda v: v + 1, lambda v: v == 1,
    lambda v: 1 in v, lambda v: v < 1, float, int, len,
]  # fmt: skip


def written_by_one(folder: str) -> int:
    writer = bmt.on_rank_0(Writer)(Path(folder), name="one")
    assert writer and writer is not None and writer != 1 and len({writer, str(writer)}) == 2
    writer.add(bmt.rank())
    writer.flag = 5  # type: ignore[attr-defined]
    assert writer.flag == 5  # type: ignore[attr-defined]
    with bmt.on_rank_0(Writer)(Path(folder)) as log:
        log.add(bmt.rank()).with_suffix(".txt")
    values = [] if bmt.rank() == 0 else [writer.path, writer.add(), writer.path.parent, writer.path.exists()]
    for value in values:
        for use in USES_OF_A_VALUE:
            with pytest.raises((bmt.errors.ConfigurationError, TypeError), match=r"rank 0 only|unsupported"):
                use(value)
    assert bmt.store.broadcast_object(writer.path) == Path(folder) / "one"
    return len(values)


def test_on_rank_0(tmp_path: Path) -> None:
    assert run_ranks(3, written_by_one, str(tmp_path)) == [0, 4, 4]
    assert (tmp_path / "one").read_text() == "0\n" and (tmp_path / "log").read_text() == "0\nclosed\n"


class LogWriter:
    """As tensorboard's: it is told its folder, and says it in several ways."""

    def __init__(self, log_dir: str | None = None, **more: object) -> None:
        self.log_dir = self.logdir = str(log_dir or more.get("logdir") or "made up")
        self.file_writer = self

    def get_logdir(self) -> str:
        return self.log_dir


@pytest.mark.parametrize("named", ["log_dir", "logdir", ""])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_folder_of_a_log_is_known_to_all(monkeypatch: pytest.MonkeyPatch, named: str, rank: str) -> None:
    monkeypatch.setenv("RANK", rank)
    make = bmt.on_rank_0(LogWriter)
    writer = make(**{named: "runs/a"}) if named else make("runs/a")
    told = {writer.log_dir, writer.logdir, writer.get_logdir(), writer.file_writer.get_logdir()}
    assert told == {"runs/a"} and str(Path(writer.log_dir, "best.pt")) == "runs/a/best.pt"


@pytest.mark.parametrize("given", [{}, {"log_dir": None}, {"comment": "a"}])
def test_a_folder_that_is_made_up_is_not(monkeypatch: pytest.MonkeyPatch, given: dict[str, object]) -> None:
    monkeypatch.setenv("RANK", "1")
    writer = bmt.on_rank_0(LogWriter)(**given)  # type: ignore[arg-type]
    for value in (writer.log_dir, writer.get_logdir(), writer.file_writer.get_logdir()):
        with pytest.raises(bmt.errors.ConfigurationError, match="rank 0 only"):
            str(value)


def test_on_rank_0_before_initialisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bmt.on_rank_0(Writer)(tmp_path).add("x") == tmp_path / "log"
    monkeypatch.setenv("RANK", "1")
    bmt.on_rank_0(Writer)(tmp_path).add("y")
    assert (tmp_path / "log").read_text() == "x\n"


def test_print_block_and_dict(capsys: pytest.CaptureFixture[str]) -> None:
    utils.print_block("Title", "content")
    head, content = capsys.readouterr().out.splitlines()
    assert " Title " in head and set(head.replace(" Title ", "")) == {"="} and len(head) == 60 and content == "content"

    utils.print_dict("Arguments", {"lr": 0.1, "long": "x" * 100, "empty": ""})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["lr", ":", "0.1"]
    assert max(map(len, lines)) <= 60 and "".join(lines).count("x") == 100
    utils.print_dict("Nothing", {}, file=sys.stderr)
    captured = capsys.readouterr()
    assert captured.out == "" and "Nothing" in captured.err


@pytest.mark.parametrize(("x", "d", "expected"), [(0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8), (7, 1, 7)])
def test_round_up(x: int, d: int, expected: int) -> None:
    assert utils.round_up(x, d) == expected


def test_check_torch_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.1+cu130")
    assert [utils.check_torch_version(version) for version in ("2.9.0", "2.11.1", "2.11.3", "3.0.0")] == [2, 0, -2, -1]


def test_average_recorder() -> None:
    recorder = utils.AverageRecorder(alpha=0.5)
    assert recorder.value == 0
    recorder.record(3.0)
    assert recorder.value == pytest.approx(3.0)
    recorder.record(6.0)
    assert recorder.value == pytest.approx((3.0 * 0.5 + 6.0) / 1.5)
    for _ in range(60):
        recorder.record(1.0)
    assert recorder.value == pytest.approx(1.0)
    assert utils.AverageRecorder(start_value=7).value == 7


def split() -> tuple[bool, bool]:
    whole = torch.arange(12).view(3, 4)
    part = utils.tp_split_tensor(whole.t(), 0)
    return torch.equal(part, whole.t()), part.is_contiguous() and part.data_ptr() != whole.data_ptr()


def test_tp_split_tensor_without_tensor_parallelism() -> None:
    assert run_ranks(1, split) == [(True, True)]


def test_load_nccl_pypi_loads_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: list[tuple[str, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: loaded.append((name, mode)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    utils.load_nccl_pypi()
    assert loaded == []

    package = ModuleSpec("nvidia.nccl", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    library = tmp_path / "lib" / "libnccl.so.2"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia.nccl": package}.__getitem__)
    utils.load_nccl_pypi()
    assert loaded == [(str(library), ctypes.RTLD_GLOBAL)]


def test_debug_values() -> None:
    debug.clear()
    assert debug.get("a") is None and debug.get("a", 3) == 3
    debug.set("a", 1)
    debug.append("list", 1)
    debug.extend("list", (2, 3))
    assert debug.get("a") == 1 and debug.get("list") == [1, 2, 3]
    debug.clear("a")
    assert debug.get("a") is None and debug.get("list") == [1, 2, 3]
    debug.clear()
    assert debug.get("list") is None
