"""Ctrl-C in training: one line from one rank, exit code 130 as a shell counts, checkpoints whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bmtrain.watch import Interrupts

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
import bmtrain as bmt

bmt.init_distributed(device="cpu")
torch.manual_seed(0)
model = bmt.BMTrainModelWrapper(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 1)))
manager = bmt.optim.OptimManager()
manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
for step in range(10 ** 9):
    manager.zero_grad()
    manager.backward(model(torch.randn(4, 6)).mean())
    manager.step()
    bmt.save(model, sys.argv[1] + "/model.pt")
    if step == 3:
        open(sys.argv[1] + "/started", "w").close()
"""


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_job_is_interrupted(tmp_path: Path, ranks: int) -> None:
    """As a terminal does it: the signal goes to the whole group. torchrun sends it once more, and traces itself."""
    (tmp_path / "train.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *launcher, str(tmp_path / "train.py"), str(tmp_path)], env=environment, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    said = [line for line in errors.splitlines() if line.startswith("bmtrain: interrupted")]
    assert len(said) == 1 and "interrupted at train.py:" in said[0], errors
    assert "\nKeyboardInterrupt\n" not in errors, errors  # no traceback; a rank may be told how another has ended
    if ranks == 1:
        assert process.returncode == -signal.SIGINT  # what a shell calls 130
        assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "started", "train.py"]
    assert len(torch.load(tmp_path / "model.pt", weights_only=True)) == 4


def test_other_errors_and_other_hooks_stay(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    made = Interrupts(0)
    sys.excepthook(ValueError, ValueError("mine"), None)
    assert capsys.readouterr().err == "ValueError: mine\n"
    made.close()
    assert sys.excepthook is sys.__excepthook__

    def own(*error: object) -> None: ...

    monkeypatch.setattr(sys, "excepthook", own)
    Interrupts(0).close()
    assert sys.excepthook is own
