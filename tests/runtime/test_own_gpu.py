"""Each rank sees one GPU, its own, for scripts that name ``cuda:0``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bmtrain import device
from bmtrain.device import choose_device, see_own_gpu
from bmtrain.errors import DeviceError


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Local rank 1 of two on a host of two GPUs, whose CUDA was not used yet."""
    for name in ("CUDA_VISIBLE_DEVICES", "BMTRAIN_GPU"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device, "_cuda_has_started", lambda: False)
    return monkeypatch


def test_nothing_is_hidden_where_there_is_nothing_to_choose(host: pytest.MonkeyPatch) -> None:
    for patch in (
        lambda one: one.setenv("LOCAL_WORLD_SIZE", "1"),
        lambda one: one.setattr(torch.version, "cuda", None),
        lambda one: one.setattr(torch.cuda, "device_count", lambda: 0),
        lambda one: one.setattr(torch.cuda, "device_count", lambda: 1),
    ):
        with host.context() as one:
            patch(one)
            see_own_gpu()
        assert "CUDA_VISIBLE_DEVICES" not in os.environ and "BMTRAIN_GPU" not in os.environ


def test_it_is_too_late_once_cuda_was_used(host: pytest.MonkeyPatch) -> None:
    host.setattr(device, "_cuda_has_started", lambda: True)
    with pytest.raises(DeviceError, match=r"import bmtrain\.own_gpu.* first line"):
        see_own_gpu()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("2,3", "3"), ("GPU-a, GPU-b", "GPU-b")])
def test_the_gpu_of_the_local_rank_is_seen(host: pytest.MonkeyPatch, visible: str | None, own: str) -> None:
    if visible is not None:
        host.setenv("CUDA_VISIBLE_DEVICES", visible)
    for _ in range(2):  # as a worker of a loader does once more
        see_own_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["BMTRAIN_GPU"] == own
    chosen: list[torch.device] = []
    host.setattr(torch.cuda, "is_available", lambda: True)
    host.setattr(torch.cuda, "device_count", lambda: 1)
    host.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device(None, 1) == torch.device("cuda", 0) and chosen == [torch.device("cuda", 0)]


def test_a_script_that_chooses_another_is_told(host: pytest.MonkeyPatch) -> None:
    see_own_gpu()
    host.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(DeviceError, match=r"CUDA_VISIBLE_DEVICES is '0', but this rank's GPU is '1'.*at the launch"):
        choose_device(None, 1)
    assert choose_device("cpu", 1) == torch.device("cpu")


def test_without_gpus_the_import_does_nothing() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import bmtrain.own_gpu, os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == ""


MIXED = """
import torch, bmtrain as bmt
bmt.init_distributed(device="cpu")
class Mixed(torch.nn.Linear):
    def forward(self, x):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
model = bmt.BMTrainModelWrapper(Mixed(2, 2))
model(torch.ones(2, 2))
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors get notes")
def test_devices_that_differ_are_explained() -> None:
    said = subprocess.run([sys.executable, "-c", MIXED], env={**os.environ}, capture_output=True, text=True)
    assert said.returncode and "this rank's model is on cpu; batches get there by" in said.stderr
