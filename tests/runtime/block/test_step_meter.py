"""What BMTRAIN_METER writes of scripts that say nothing of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import on_ranks, run_ranks

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError
from bmtrain.shard.engine import engine

ON_CPU = os.environ.get("BMTRAIN_TEST_DEVICE", "cpu") == "cpu"


def on_device(module: torch.nn.Module) -> torch.nn.Module:
    return bmt.BMTrainModelWrapper(module.to(context().device.torch_device))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(ranks: int, folder: Path, function: Callable[..., Any], *args: Any) -> tuple[list[dict[str, Any]], Any]:
    path = folder / "new" / "run.jsonl"
    results = run_ranks(ranks, function, *args, env={"BMTRAIN_METER": str(path)}, fresh=True)
    return lines(path), results


def train(steps: int, backwards: int, clips: int) -> tuple[list[float], list[float], str, list[float]]:
    """Losses, norms, what is printed, and the parameters, of a job whose ranks have losses of their own."""
    torch.manual_seed(0)
    model = on_device(torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 3)))
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    tokens = torch.arange(8, device=context().device.torch_device).view(2, 4)
    losses, norms, said = [], [], io.StringIO()
    with contextlib.redirect_stdout(said):
        for _ in range(steps):
            manager.zero_grad()
            total = 0.0
            for _ in range(backwards):
                loss = (model(tokens) - context().topology.data_rank).pow(2).mean() / backwards
                manager.backward(loss)
                total += bmt.sum_loss(loss).item()
            with torch.no_grad():
                model(tokens)  # is looked at, not trained on
            losses.append(total)
            params = list(model.parameters())
            parts = [params[i::clips] for i in range(clips)]
            norms.append(math.hypot(*(float(manager.clip_grad_norm(part, 1e9)) for part in parts)))
            manager.step()
    with bmt.gathered(model):
        return losses, norms, said.getvalue(), [float(p.detach().sum()) for p in model.parameters()]


@pytest.mark.parametrize("ranks, backwards, clips", [(1, 1, 1), (2, 1, 1), (2, 3, 2)])
def test_a_script_is_measured_without_a_line_of_it(tmp_path: Path, ranks: int, backwards: int, clips: int) -> None:
    reports, results = measured(ranks, tmp_path, train, 31, backwards, clips)
    told = [*range(1, 11), 20, 30]
    assert [report["step"] for report in reports] == told
    losses, norms, *_ = results[0]
    assert [report["loss"] for report in reports] == pytest.approx([losses[step - 1] for step in told])
    assert [report["gradient_norm"] for report in reports] == pytest.approx([norms[step - 1] for step in told])
    for report in reports:
        assert report["seconds"] > 0 and 0 <= report["exposed_communication"] <= 1
        assert report["tokens_per_second"] * report["seconds"] == pytest.approx(8 * backwards)
        assert (report["peak_gib"] is None) is ON_CPU and "loss_scale" not in report
    # What is trained, and printed, is what it is without.
    assert run_ranks(ranks, train, 31, backwards, clips) == results and all(said == "" for _, _, said, _ in results)


def test_model_flops_are_of_what_was_counted(tmp_path: Path) -> None:
    reports, _ = measured(1, tmp_path, with_a_known_peak)
    assert [report["mfu"] for report in reports] == pytest.approx(
        [report["tokens_per_second"] * 6 * (9 * 6 + 6 * 3) / 1e6 for report in reports]
    )


def with_a_known_peak() -> None:
    with mock.patch.object(context().device, "peak_flops", lambda: 1e6):
        train(3, 1, 1)


def of_samples() -> None:
    device = context().device.torch_device
    generator, critic = on_device(torch.nn.Linear(4, 4)), on_device(torch.nn.Linear(4, 1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (generator, critic)]
    manager = bmt.optim.OptimManager(loss_scale=64.0)
    for optimizer in optimizers:
        manager.add_optimizer(optimizer)
    for _ in range(3):
        for optimizer in optimizers:  # the critic sees 5 + 3 rows a step, the generator 3
            manager.zero_grad()
            made = generator(torch.randn(3, 4, device=device))
            loss = critic(torch.randn(5, 4, device=device)).mean() - critic(made).mean()
            manager.backward(loss)
            manager.step(optimizer)


def test_samples_of_the_model_that_got_most_and_the_loss_scale(tmp_path: Path) -> None:
    reports, _ = measured(2, tmp_path, of_samples)
    assert [report["step"] for report in reports] == [1, 2, 3, 4, 5, 6]
    for report in reports:
        assert report["samples_per_second"] * report["seconds"] == pytest.approx(8)
        assert report["loss_scale"] == 64 and report["mfu"] is None
        assert "tokens_per_second" not in report and "gradient_norm" not in report


def without_a_manager() -> None:
    model = on_device(torch.nn.Linear(4, 1))
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(torch.ones(2, 4, device=context().device.torch_device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_that_no_manager_drives(tmp_path: Path) -> None:
    reports, _ = measured(2, tmp_path, without_a_manager)
    assert [report["step"] for report in reports] == [1, 2]
    assert all("samples_per_second" in report and "loss" not in report for report in reports)


def one_rank_has_no_loss() -> None:
    model = on_device(torch.nn.Linear(4, 1))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=0.0))
    out = model(torch.ones(2, 4, device=context().device.torch_device))
    if bmt.rank() == 0:
        manager.backward(out.sum() * 0 + 7)
    else:
        out.sum().backward()
    manager.step()


def test_the_loss_is_that_of_ranks_that_have_one(tmp_path: Path) -> None:
    reports, _ = measured(2, tmp_path, one_rank_has_no_loss)
    assert [report["loss"] for report in reports] == [7.0]


def slices() -> None:
    train(2, 1, 1)


def test_ranks_that_hold_slices_share_their_tokens(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run_ranks(2, slices, env={"BMTRAIN_METER": str(path)}, init={"tp_size": 2}, fresh=True)
    for report in lines(path):
        assert report["tokens_per_second"] * report["seconds"] == pytest.approx(8 / 2)


def goes_elsewhere(path: str, folder: str) -> str:
    os.chdir(folder)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        without_a_manager()
        if bmt.rank() == 0:
            Path(path).unlink()
            Path(path).mkdir()  # where nothing can be written
        without_a_manager()
    return said.getvalue()


def test_a_file_that_cannot_be_written_any_more_ends_no_job(tmp_path: Path) -> None:
    path, folder = tmp_path / "run.jsonl", tmp_path / "elsewhere"
    folder.mkdir()
    said, other = run_ranks(
        2, goes_elsewhere, str(path), str(folder), env={"BMTRAIN_METER": os.path.relpath(path)}, fresh=True
    )
    assert said.count("cannot be written any more") == 1 and "cannot" not in other
    assert list(folder.iterdir()) == []


def test_a_file_that_is_there_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 9, "loss": 1}\n')
    run_ranks(1, without_a_manager, env={"BMTRAIN_METER": str(path)}, fresh=True)
    assert [report["step"] for report in lines(path)] == [9, 1, 2]


@on_ranks(1, 2)
def test_nothing_is_measured_where_nobody_asks() -> None:
    assert engine().meter is None and context().meter is None


@on_ranks(2, initialize=False, fresh=True)
def test_ranks_of_which_one_is_asked(tmp_path: Path) -> None:
    if os.environ["RANK"] == "1":
        os.environ["BMTRAIN_METER"] = str(tmp_path / "run.jsonl")
    with pytest.raises(ConfigurationError, match="BMTRAIN_METER must be in the environment of all ranks or of none"):
        bmt.init_distributed(device="cpu")


@pytest.mark.parametrize("name", ["1", "true", "run", "run.json", "runs/", ".jsonl"])
@on_ranks(1, initialize=False, fresh=True)
def test_what_is_no_name_of_such_a_file(name: str) -> None:
    os.environ["BMTRAIN_METER"] = name
    with pytest.raises(ConfigurationError, match=r"it must be a file that ends in \.jsonl"):
        bmt.init_distributed(device="cpu")


@on_ranks(1, initialize=False, fresh=True)
def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("file/run.jsonl", "folder.jsonl"):
        os.environ["BMTRAIN_METER"] = str(tmp_path / name)
        with pytest.raises(ConfigurationError, match=r"BMTRAIN_METER names cannot be written: .*: \w+"):
            bmt.init_distributed(device="cpu")
