"""What the meter says of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.device import Device
from bmtrain.errors import ConfigurationError


def measures(folder: str) -> None:
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(10, 20))
    with pytest.raises(ConfigurationError, match="every must be at least 1"):
        bmt.Meter(model, every=0)
    path = Path(folder) / "run.jsonl"
    meter = bmt.Meter(model, every=2, path=path)
    assert meter.flops_per_token == 6 * 200
    meter._peak = 1e6
    found = []
    for step in range(5):
        time.sleep(0.05)
        found.append(meter.step(tokens=100, loss=torch.tensor(float(step)), loss_scale=4))
    assert [report is None for report in found] == [True, False, True, False, True]
    for report, step in ((found[1], 2), (found[3], 4)):
        assert report is not None and report["step"] == step
        assert 0.05 <= report["seconds"] < 5 and report["peak_gib"] is None
        assert report["tokens_per_second"] == pytest.approx(100 / report["seconds"])
        assert report["mfu"] == pytest.approx(report["tokens_per_second"] * 1200 / 1e6)
        assert (report["loss"], report["loss_scale"]) == (step - 1, 4)
    context().control.barrier()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(written) == 2
    if bmt.rank() == 0:
        assert written == [found[1], found[3]]
    assert bmt.Meter(model, flops_per_token=7).step(tokens=1) is None


def test_a_run_is_measured(tmp_path: Path) -> None:
    run_ranks(2, measures, str(tmp_path))


PEAKS = {
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA H20": 148e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12, "Tesla T4": 65e12, "NVIDIA L40": 181e12,
    "NVIDIA RTX A1000": 0.0, "Another": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "flops"), PEAKS.items())
def test_peaks_of_gpus(monkeypatch: pytest.MonkeyPatch, name: str, flops: float) -> None:
    device = Device(torch.device("cpu"))
    assert device.peak_flops() == 0
    monkeypatch.setattr(device, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device.peak_flops() == flops
