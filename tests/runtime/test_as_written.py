"""Scripts as people write them: the original alone, the converted one on two ranks, the same losses and weights."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import as_written
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import bmtrain as bmt
from bmtrain import context
from rewriter.convert import convert_text

Seen = dict[str, Any]


def original(text: str, folder: str) -> Seen:
    """Runs a script as it is; where it starts a process group, with gloo."""
    backward, losses = torch.Tensor.backward, []

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():  # another default device would call this once more
            losses.append(float(self.detach()))
            backward(self, *args, **kwargs)

    class OnTheCpu(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            super().__init__(module)

    start, store = dist.init_process_group, os.path.join(folder, "store")
    with (
        mock.patch.object(torch.Tensor, "backward", watched),
        mock.patch.object(torch.nn.parallel, "DistributedDataParallel", OnTheCpu),
        mock.patch.object(
            dist,
            "init_process_group",
            lambda *args, **kwargs: start(
                "gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=bmt.world_size()
            ),
        ),
    ):
        seen = _run(text, folder)
    losses = _over_ranks(torch.tensor(losses)).tolist()
    if dist.is_initialized():
        dist.destroy_process_group()
    return {**seen, "losses": losses}


def converted(text: str, folder: str) -> Seen:
    losses: list[float] = []
    scale = bmt.optim.OptimManager.scale_loss

    def watched(self: Any, loss: torch.Tensor) -> torch.Tensor:
        losses.append(float(bmt.sum_loss(loss.detach())))
        return scale(self, loss)

    with (
        mock.patch.object(bmt.optim.OptimManager, "scale_loss", watched),
        mock.patch.object(bmt, "init_distributed", lambda seed=0: context._seed_everything(seed)),
    ):
        return {**_run(text, folder), "losses": losses}


def _over_ranks(values: torch.Tensor) -> torch.Tensor:
    return bmt.sum_loss(values) if bmt.world_size() > 1 else values


def _run(text: str, folder: str) -> Seen:
    """What a script prints, and the weights of its ``model`` in the end."""
    os.chdir(folder)
    output = io.StringIO()
    names: dict[str, Any] = {"__name__": "__main__"}
    context._seed_everything(0)  # what init_distributed does where the script sets no seed
    with contextlib.ExitStack() as stack:
        for owner in (torch.Tensor, torch.nn.Module):
            stack.enter_context(mock.patch.object(owner, "cuda", lambda self, *args, **kwargs: self))
        stack.enter_context(mock.patch.object(torch.cuda, "set_device", lambda device: None))
        stack.enter_context(contextlib.redirect_stdout(output))
        exec(compile(text, "script", "exec"), names)
    weights = {name: value.detach().clone() for name, value in names["model"].state_dict().items()}
    return {"printed": output.getvalue(), "weights": weights}


def check(text: str, folder: Path, ranks: int) -> None:
    if torch.cuda.is_available() and re.search("cuda:0|device='cpu'|GradScaler", text):
        pytest.skip("it names a device, and ranks of tests see all; or other steps overflow than on one rank")
    before = as_written.HEAD + text
    result = convert_text(before)
    assert result.changed and not result.error
    folders = [folder / name for name in ("original", "converted")]
    for one in folders:
        one.mkdir()
    first = run_ranks(ranks, original, before, str(folders[0]))[0]
    second = run_ranks(2, converted, result.after.decode(), str(folders[1]))
    assert not second[1]["printed"], "the other rank prints nothing"
    assert first["losses"] == pytest.approx(second[0]["losses"], rel=1e-5)
    assert all(map(math.isfinite, first["losses"])) and first["losses"]
    _same_tensors(first["weights"], second[0]["weights"])
    _same_tensors(second[0]["weights"], second[1]["weights"])
    for old, new in zip(_numbers(first["printed"]), _numbers(second[0]["printed"]), strict=True):
        assert new == pytest.approx(old, rel=1e-4, abs=1.1e-4)
    files = sorted(path.name for path in folders[0].glob("*.p*"))
    assert files == sorted(path.name for path in folders[1].glob("*.p*"))
    for name in files:
        _same_tensors(*(dict(_tensors(torch.load(one / name, weights_only=False))) for one in folders))


def _same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name].cpu(), value.cpu(), rtol=2e-4, atol=2e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")


def _numbers(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", printed)]


@pytest.mark.parametrize("text", as_written.ALONE.values(), ids=as_written.ALONE.keys())
def test_the_same_on_two_ranks_as_alone(text: str, tmp_path: Path) -> None:
    check(text, tmp_path, 1)


@pytest.mark.parametrize("text", as_written.DATA_PARALLEL.values(), ids=as_written.DATA_PARALLEL.keys())
def test_the_same_as_data_parallel(text: str, tmp_path: Path) -> None:
    check(text, tmp_path, 2)
