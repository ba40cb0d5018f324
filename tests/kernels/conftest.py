"""Tests of the kernels and of the NCCL transport.  Those marked ``gpu`` need a GPU and bmtrain's compiled extension."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))  # the harness that runs several ranks


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn: the torch operations on the CPU, the compiled kernels on the GPU."""
    if request.param == "cuda":
        from bmtrain import kernels

        assert kernels.compiled(), "build the extension first: python setup.py build_ext --inplace"
    torch.manual_seed(0)
    return torch.device(request.param)
