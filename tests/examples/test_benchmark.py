"""The benchmark runs on a machine without a GPU too, at a size made for it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.runtime.ranks import run_script

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "examples" / "benchmark"


def run(*arguments: str, script: str = "run.py") -> subprocess.CompletedProcess[str]:
    (done,) = run_script(
        BENCHMARK / script, *arguments, env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}, timeout=300
    )
    return done


@pytest.fixture(name="streams", scope="module")
def load_streams() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_streams", BENCHMARK / "streams.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def event(name: str, stream: int, begin: float, end: float) -> dict[str, Any]:
    return {"name": name, "ts": begin, "dur": end - begin, "args": {"stream": stream}}


def test_busy_time_counts_overlapping_work_once(streams: ModuleType) -> None:
    assert streams.busy([event("a", 1, 0, 10), event("b", 1, 5, 8), event("c", 1, 20, 25)]) == 15


def test_the_profile_says_how_gathers_moved(streams: ModuleType) -> None:
    events = [
        event("gemm", 7, 0, 4000),
        event("Memcpy PtoP (Device -> Device)", 8, 1000, 3000),
        event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 9, 3000, 5000),
    ]
    lines = streams.summary(events, steps=1)
    assert lines[0] == "span 5.0 ms per step"
    assert "stream 8: 1 operations, busy 2.0 ms, idle 3.0 ms" in lines
    assert "gathers moved by copy engines (Memcpy PtoP): 1 operations, 2.0 ms" in lines
    assert "reductions moved by a kernel: 1 operations, 2.0 ms" in lines


def test_a_workload_that_is_none_is_explained() -> None:
    (done,) = run_script(BENCHMARK / "run.py", "nano:two:full")
    assert done.returncode == 1
    assert "SIZE:BATCH:RECOMPUTE" in done.stderr


def test_engines_run_side_by_side(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = run(
        "nano:1:full", "--engines", "bmtrain", "fsdp2", "deepspeed", "--ranks", "2", "--sequence", "16",
        "--warmup", "1", "--steps", "2", "--json", str(results), "--picture", str(tmp_path / "benchmark.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, fsdp2, deepspeed = json.loads(results.read_text())["nano:1:full"]
    for result in (ours, fsdp2):
        assert result["failure"] is None
        assert result["tokens"] > 0
        assert result["losses"][-1] < result["losses"][0]
    assert ours["losses"] == pytest.approx(fsdp2["losses"], rel=1e-5)
    assert deepspeed["failure"].startswith("not measured: DeepSpeed is ")
    assert (tmp_path / "benchmark.png").stat().st_size > 0


@pytest.mark.long
def test_an_engine_whose_losses_differ_has_failed(tmp_path: Path) -> None:
    done = run(
        "nano:1:none", "nano:1:full", "--engines", "fsdp2", "bmtrain", "--ranks", "2", "--sequence", "16",
        "--warmup", "1", "--steps", "2", "--tolerance", "-1", "--picture", str(tmp_path / "benchmark.png"),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("failed: its losses differ from those of fsdp2 by") == 2, done.stdout


@pytest.mark.long
def test_startup_without_a_gpu() -> None:
    done = run("--startup", "nano", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert float(lines["bmtrain"][0]) > 0 and float(lines["fsdp2"][0]) > 0
    assert lines["bmtrain"][3:] == ["-"] * 4
    assert lines["deepspeed"][:3] == ["not", "measured:", "DeepSpeed"]


def test_a_users_script_is_no_other_when_converted(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    done = run(
        "nano:1", "--ranks", "2", "--engines", "ddp", "converted", "--length", "16", "--steps", "4",
        "--json", str(rows), script="user.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ddp, converted = json.loads(rows.read_text())
    assert [ddp["engine"], converted["engine"]] == ["ddp", "converted"]
    assert ddp["median"] > 0 and converted["median"] > 0
    assert converted["losses"] == pytest.approx(ddp["losses"], rel=1e-4) and len(converted["losses"]) == 4


@pytest.mark.long
def test_a_row_whose_losses_differ_has_failed() -> None:
    more = ("--engines", "ddp", "converted", "--length", "16", "--steps", "2", "--tolerance", "-1")
    done = run("nano:1", "--ranks", "2", *more, script="user.py")
    assert done.returncode == 1
    assert "FAILED: losses differ from those of ddp x2" in done.stdout


def test_a_users_workload_that_is_none_is_explained() -> None:
    (done,) = run_script(BENCHMARK / "user.py", "nano:1:accum")
    assert done.returncode == 1
    assert "SIZE:BATCH" in done.stderr


def test_plain_and_converted_take_turns() -> None:
    (done,) = run_script(BENCHMARK / "in_turns.py", "nano", "--batch", "2", "--length", "16", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    title, names, *phases = done.stdout.splitlines()
    assert title.startswith("nano:2, 1 rank,") and names.split() == ["plain", "converted"]
    assert len(phases) == 7 and all(len(line.split("(")) == 3 for line in phases)


def test_take_turns_refuses_a_size_there_is_not() -> None:
    (done,) = run_script(BENCHMARK / "in_turns.py", "huge")
    assert done.returncode == 2 and "huge" in done.stderr
