"""What the meter says of a run."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

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
    found = []
    for step in range(5):
        time.sleep(0.05)
        loss = torch.tensor(float(step), requires_grad=True)  # as it is after its backward
        with warnings.catch_warnings(), mock.patch.object(context().device, "peak_flops", lambda: 1e6):
            warnings.simplefilter("error")
            found.append(meter.step(tokens=100, loss=loss, loss_scale=4))
    assert [report is None for report in found] == [True, False, True, False, True]
    for report, step in ((found[1], 2), (found[3], 4)):
        assert report is not None and report["step"] == step
        assert 0.05 <= report["seconds"] < 5 and (report["peak_gib"] is None) is not context().device.is_apart
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


class Bar:
    def __init__(self) -> None:
        self.shown: list[object] = []

    def set_postfix(self, values: object) -> None:
        self.shown.append(values)


class Run:
    def __init__(self) -> None:
        self.shown: list[object] = []

    def log(self, values: object, step: int) -> None:
        self.shown.append((step, values))


class Writer(Run):
    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.shown.append((name, value, step))


def tells_others() -> list[list[object]]:
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(10, 20))
    for wrong in (3, "run", [print]):
        with pytest.raises(ConfigurationError, match=r"A writer of bmt\.Meter is a"):
            bmt.Meter(model, writers=[wrong])
    bar, run, writer, reports = Bar(), Run(), Writer(), list[object]()
    meter = bmt.Meter(model, every=1, writers=[bar, None, run, writer, reports.append])
    meter.step(tokens=4, loss=2.5)
    return [bar.shown, run.shown, writer.shown, reports]


def test_writers_are_told_by_rank_0() -> None:
    (bar, run, writer, reports), others = run_ranks(2, tells_others)
    assert others == [[], [], [], []]
    ((step, values),), (report,) = run, reports
    assert (step, report["step"], values["loss"]) == (1, 1, 2.5) and bar == [values]
    # What is not known on a CPU is left out.
    known = {"peak_gib", "mfu"} if os.environ.get("BMTRAIN_TEST_DEVICE", "cpu") != "cpu" else set()
    assert set(values) == {"seconds", "tokens_per_second", "exposed_communication", "loss"} | known
    assert writer == [(name, value, 1) for name, value in values.items()]


def waits_for_others(share: float) -> list[float]:
    """What three reports say of steps to whose end rank 1 comes late, by ``share`` of the time."""
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(10, 20))
    context().control.barrier()
    meter, other, found = bmt.Meter(model, every=2), bmt.Meter(model, every=1), []
    for _ in range(6):
        time.sleep(0.1 if bmt.rank() == 0 else 0.1 / (1 - share))
        bmt.total(1.0)
        other.step(tokens=1)  # which has its own beginning
        report = meter.step(tokens=1)
        if report is not None:
            found.append(report["exposed_communication"])
    return found


def test_time_in_collectives_is_said() -> None:
    early, late = run_ranks(2, waits_for_others, 0.5)
    assert len(early) == len(late) == 3
    assert all(0.25 < share < 1 for share in early) and all(0 <= share < 1 for share in late)
    assert sum(early) > sum(late) + 0.3  # 1.5 and 0 on a machine that does nothing else


def knows_no_waits() -> list[object]:
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(10, 20))
    meter = bmt.Meter(model, every=1)
    model(torch.ones(2, 10)).sum().backward()  # one rank waits for nobody
    report = meter.step(tokens=1)
    assert report is not None
    return [report["exposed_communication"]]


def test_one_rank_waits_for_nobody() -> None:
    assert run_ranks(1, knows_no_waits) == [[0.0]]


def is_not_watched() -> list[object]:
    with mock.patch.object(context(), "watchdog", None):  # as BMTRAIN_WATCH=0 leaves it
        return knows_no_waits()


def test_what_is_not_watched_is_not_known() -> None:
    assert run_ranks(2, is_not_watched) == [[None], [None]]


def test_waits_inside_of_waits_count_once_and_only_when_asked() -> None:
    waits = Device(torch.device("cpu")).waits
    with waits.at():
        time.sleep(0.02)
    assert waits.seconds() == 0
    waits.is_on = True
    with waits.at():
        with waits.at():
            time.sleep(0.02)
        with pytest.raises(ConfigurationError), waits.at():
            raise ConfigurationError("x")
        time.sleep(0.02)
    assert 0.04 <= waits.seconds() < 1  # a busy machine may take longer
    known = waits.seconds()
    waits.__enter__()  # a collective that another thread left in its middle
    assert waits.seconds() == known
    with waits.at():
        time.sleep(0.01)
    assert waits.seconds() > known


class Clock:
    """In the place of torch.cuda.Event; what is recorded on a stream is passed at that stream's time."""

    time = 0.0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Clock.made += 1

    def record(self, stream: object) -> None:
        assert stream == "compute"
        self.at = Clock.time

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Clock) -> float:
        return (later.at - self.at) * 1000


def test_a_gpu_waits_where_its_own_stream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    device: Any = Device(torch.device("cpu"))
    device.is_cuda, device.gather_stream, device.reduce_stream = True, "gather", "reduce"
    stream = ["compute"]
    device.current_stream = lambda: stream[0]
    device.waits.is_on = True
    for moved, given, now in (
        (1, None, "compute"), (2, "compute", "gather"), (4, None, "gather"), (8, "reduce", "compute"),
    ):  # fmt: skip
        stream[0] = now
        with device.waits.at(given):
            with device.waits.at("gather"):
                pass
            Clock.time += moved
    assert device.waits.seconds() == 3
    made, stream[0] = Clock.made, "compute"
    for _ in range(5000):
        with device.waits.at():
            Clock.time += 1
    assert Clock.made < made + 3000  # they are used again
    assert device.waits.seconds() == 5003


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
