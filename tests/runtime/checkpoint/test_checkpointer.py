"""Checkpoints of a whole job: whole or not at all, bit for bit, from any number of ranks to any other."""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.checkpoint import Checkpointer


class Net(nn.Module):
    """Sizes at which parts begin and end in the middle of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 35), nn.Dropout(0.2), nn.Linear(35, 6))])
        self.layers.append(nn.Sequential(nn.Linear(6, 35), nn.Dropout(0.2), nn.Linear(35, 6)))
        self.last = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.last.weight
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.cube = nn.Parameter(torch.randn(3, 5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        self.steps += 1
        x = self.norm(self.head(self.last(x)))
        return x * self.scale + self.cube.mean()


class Job:
    """A small training job with all that has state."""

    def __init__(
        self, folder: Any, kind: str = "adam", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
    ) -> None:
        torch.manual_seed(seed)
        net = Net()
        for index, layer in enumerate(net.layers):
            net.layers[index] = bmt.Block(layer)
        self.model: Any = bmt.BMTrainModelWrapper(net.to(dtype))
        make: dict[str, Callable[[], Any]] = {
            "adam": lambda: bmt.optim.AdamOptimizer(self.model.parameters(), lr=0.01, weight_decay=0.01),
            "offload": lambda: bmt.optim.AdamOffloadOptimizer(self.model.parameters(), lr=0.01),
            "torch": lambda: torch.optim.AdamW(self.model.parameters(), lr=0.01),
            "sgd": lambda: torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9),
            "tensors": lambda: torch.optim.AdamW(self.model.parameters(), lr=0.01),
            "whole": lambda: torch.optim.AdamW(self.model.parameters(), lr=0.01),
        }
        optimizer = make[kind]()
        self.manager = bmt.optim.OptimManager(loss_scale=64.0, loss_scale_steps=2)
        schedule = bmt.lr_scheduler.Linear(optimizer, 0.01, 2, 40)
        self.manager.add_optimizer(optimizer, schedule, step_on=kind if kind in ("tensors", "whole") else None)
        self.seen: dict[str, Any] = {"losses": [], "best": float("inf"), "mean": torch.zeros(3)}
        self.ckpt = Checkpointer(folder, model=self.model, optimizer=self.manager, seen=self.seen, **options)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.manager.zero_grad()
            x = models.share(oracle.inputs(step)).to(self.model.cube.dtype)
            loss = oracle.mean(self.model(x))
            self.manager.backward(loss)
            self.manager.clip_grad_norm(self.model.parameters(), 0.5)
            self.manager.step()
            value = float(bmt.sum_loss(loss.detach()))
            self.seen["losses"].append(value + random.random() + float(numpy.random.rand()))
            self.seen["best"] = min(self.seen["best"], value)
            self.seen["mean"] += value

    def facts(self) -> dict[str, Any]:
        whole = copy.deepcopy(self.manager.state_dict())
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "optimizer": whole["optimizers"][0]["state"],
            "groups": whole["optimizers"][0]["param_groups"],
            "rest": {k: v for k, v in whole.items() if k != "optimizers"},
            "seen": copy.deepcopy(self.seen),
            "drawn": (torch.rand(3), random.random(), numpy.random.rand()),
        }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        assert torch.equal(found.cpu(), expected.cpu()), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), (where, found.keys(), expected.keys())
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}.{number}")
    else:
        assert found == expected, (where, found, expected)


ALL = [
    ("adam", torch.float32), ("adam", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float16),
    ("tensors", torch.float32), ("whole", torch.float32), ("offload", torch.bfloat16),
]  # fmt: skip


@on_ranks(1, 2, 3)
def test_a_resumed_job_is_the_undisturbed_one(tmp_path: Path) -> None:
    for number, (kind, dtype) in enumerate(ALL):
        folder = tmp_path / str(number)
        straight = Job(folder, kind, dtype)
        torch.manual_seed(1)
        straight.train(1, 3)
        straight.ckpt.save(3)
        straight.train(4, 5)
        expected = straight.facts()
        straight.ckpt.close()
        job = Job(folder, kind, dtype, seed=7)
        torch.manual_seed(8)
        job.train(1, 1)
        assert job.ckpt.resume() == 3
        job.train(4, 5)
        assert_same(job.facts(), expected, f"{kind} {dtype}")
        job.ckpt.close()


def saved(folder: str) -> list[dict[str, Any]]:
    found = []
    for number, (kind, dtype) in enumerate(ALL):
        job = Job(os.path.join(folder, str(number)), kind, dtype)
        job.train(1, 2)
        job.ckpt.save(2)
        found.append(job.facts())
        job.ckpt.close()
    return found


def loaded(folder: str) -> list[dict[str, Any]]:
    found = []
    for number, (kind, dtype) in enumerate(ALL):
        job = Job(os.path.join(folder, str(number)), kind, dtype, seed=5)
        assert job.ckpt.resume() == 2
        found.append(job.facts())
        job.train(3, 3)
        job.ckpt.close()
    return found


@pytest.mark.parametrize("before", [1, 2, 3])
def test_any_number_of_ranks_reads_what_another_wrote(before: int, tmp_path: Path) -> None:
    expected = run_ranks(before, saved, str(tmp_path))[0]
    for after in {1, 2, 3} - {before}:
        for theirs in run_ranks(after, loaded, str(tmp_path)):
            assert_same(theirs, expected, f"{before} to {after}")


def test_torch_reads_it(tmp_path: Path) -> None:
    """The names, shapes and values are there for torch.distributed.checkpoint itself."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    (expected, *_), *_ = run_ranks(2, saved, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(tmp_path / "0" / "step-0000000002", tmp_path / "plain.pt")
    found = torch.load(tmp_path / "plain.pt")
    names = [name for name in expected["model"] if name != "head.weight"]  # tied, and kept once
    assert_same({name: found["model"][name] for name in names}, {name: expected["model"][name] for name in names})
    for number, state in expected["optimizer"].items():
        assert_same(found["optimizer"]["optimizers"][0]["state"][number], state)
