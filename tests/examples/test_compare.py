"""examples/compare.py, which decides whether the example's two runs agree, notices when they do not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.runtime.ranks import run_script

COMPARE = Path(__file__).parents[2] / "examples" / "compare.py"
LOSSES = [5.0 - 0.1 * step for step in range(40)]
RESUMED = [(step, LOSSES[step]) for step in [*range(30), *range(20, 40)]]


def compare(folder: Path, plain: list[float], converted: list[tuple[int, float]]) -> subprocess.CompletedProcess[str]:
    logs = {"plain": list(enumerate(plain)), "converted": converted}
    for name, entries in logs.items():
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in entries]
        (folder / name).write_text("\n".join(lines))
    arguments = [str(folder / "plain"), str(folder / "converted"), "--picture", str(folder / "losses.png")]
    return run_script(COMPARE, *arguments)[0]


def test_equal_runs_pass(tmp_path: Path) -> None:
    done = compare(tmp_path, LOSSES, RESUMED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "losses.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("plain", "converted", "complaint"),
    [
        ([*LOSSES[:25], LOSSES[25] * 1.0001, *LOSSES[26:]], RESUMED, "difference between converted and unconverted"),
        (LOSSES, [(25, LOSSES[25] * 1.0001), *RESUMED], "steps run again"),
        pytest.param(LOSSES, list(enumerate(LOSSES)), "0 steps run again", marks=pytest.mark.long),
        pytest.param([5.0] * 40, [(step, 5.0) for step, _ in RESUMED], "unigram entropy", marks=pytest.mark.long),
        pytest.param(LOSSES[:-1], RESUMED, "39 steps", marks=pytest.mark.long),
        (LOSSES, RESUMED[:5] + RESUMED[40:], "steps are missing"),
    ],
)
def test_differences_fail(
    tmp_path: Path, plain: list[float], converted: list[tuple[int, float]], complaint: str
) -> None:
    done = compare(tmp_path, plain, converted)
    assert done.returncode == 1
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("ok")]
    assert any(complaint in line for line in said), said
