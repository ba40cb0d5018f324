"""Checkpoints of a whole job: whole or not at all, bit for bit, from any number of ranks to any other."""

from __future__ import annotations

import copy
import os
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Barrier
from typing import Any

import models
import numpy
import oracle
import pytest
import torch
from fresh import PLENTY, fresh_plan, memory_of
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.checkpoint import Checkpointer, checkpointer, storage
from bmtrain.context import context
from bmtrain.device import Device
from bmtrain.errors import CheckpointError


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
            net.layers[index] = bmt.Block(layer, zero_level=3 - index)
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


@on_ranks(1, 2)
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


@on_ranks(1, 2, init={"precision": "bf16"})
def test_under_a_precision_with_frozen_layers_and_late_groups(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[Any, Any, Checkpointer]:
        torch.manual_seed(seed)
        net = nn.Sequential(bmt.Block(nn.Linear(6, 5)), nn.Linear(5, 5), bmt.Block(nn.Linear(5, 6), precision="fp32"))
        net[1].requires_grad_(False)
        model: Any = bmt.BMTrainModelWrapper(net)
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01)
        ckpt = Checkpointer(tmp_path, model=model, optimizer=optimizer)  # it learns of shards only now:
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(optimizer)
        optimizer.add_param_group({"params": [model[2].weight], "lr": 0.1})
        return model, manager, ckpt

    def train(model: Any, manager: Any, first: int) -> None:
        for step in range(first, first + 2):
            manager.zero_grad()
            manager.backward(oracle.mean(model(models.share(oracle.inputs(step)))))
            manager.step()

    model, manager, ckpt = make(0)
    train(model, manager, 1)
    ckpt.save(2)
    train(model, manager, 3)
    expected = copy.deepcopy((model.state_dict(), manager.state_dict()))
    ckpt.close()
    model, manager, ckpt = make(1)
    train(model, manager, 1)
    assert ckpt.resume() == 2
    train(model, manager, 3)
    assert_same((model.state_dict(), manager.state_dict()), expected)
    ckpt.close()


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


@pytest.mark.parametrize(
    "before", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]
)
def test_any_number_of_ranks_reads_what_another_wrote(before: int, tmp_path: Path) -> None:
    expected = run_ranks(before, saved, str(tmp_path))[0]
    for after in {1, 2, 3} - {before}:
        for theirs in run_ranks(after, loaded, str(tmp_path)):
            assert_same(theirs, expected, f"{before} to {after}")


# (ranks, shard_size), before and after
MESHES = [((4, 2), (2, 1))]
MORE = [
    ((2, 1), (4, 2)),
    ((4, 1), (4, 4)),
    ((4, 4), (4, 1)),
    ((4, 2), (3, 3)),
    ((3, 3), (4, 2)),
    ((2, 1), (1, 1)),
    ((1, 1), (4, 2)),
]


@pytest.mark.parametrize(
    ("before", "after"), [*MESHES, *(pytest.param(*pair, marks=pytest.mark.long) for pair in MORE)], ids=str
)
def test_any_mesh_reads_what_another_wrote(before: tuple[int, int], after: tuple[int, int], tmp_path: Path) -> None:
    expected, *others = run_ranks(before[0], saved, str(tmp_path), init={"shard_size": before[1]})
    for theirs in others:
        assert_same(theirs, expected)
    if before == (4, 2):  # every element is written once, by all ranks about equally
        files = [tmp_path / "0" / "step-0000000002" / f"__{rank}_0.distcp" for rank in range(4)]
        sizes = [file.stat().st_size for file in files]
        assert min(sizes) > 0.5 * max(sizes), sizes
    for theirs in run_ranks(after[0], loaded, str(tmp_path), init={"shard_size": after[1]}):
        assert_same(theirs, expected)


def test_torch_reads_it(tmp_path: Path) -> None:
    """The names, shapes and values are there for torch.distributed.checkpoint itself."""
    import torch.distributed.checkpoint as dcp
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
    state = {"model": {"cube": torch.zeros(3, 5, 7), "last.weight": torch.zeros(6, 6)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=tmp_path / "0" / "step-0000000002", no_dist=True)
    assert_same(state["model"], {name: expected["model"][name] for name in state["model"]})


class Count:
    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Many:
    """All forms in which state is given."""

    def __init__(self, folder: Any, seed: int) -> None:
        torch.manual_seed(seed)
        self.models: list[Any] = [bmt.BMTrainModelWrapper(nn.Linear(5, 7)), nn.Linear(3, 2)]
        self.average = {name: p.data.clone() for name, p in self.models[0].named_parameters()}
        self.optimizers = {
            "adam": bmt.optim.AdamOptimizer(self.models[0].parameters(), lr=0.1),
            "plain": torch.optim.SGD(self.models[1].parameters(), lr=0.1, momentum=0.9),
        }
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizers["plain"], [1, 3])
        self.count, self.log = Count(seed), [seed, {"text": f"{seed}"}, torch.full((2,), float(seed))]
        self.empty = {"none": None, "nothing": torch.zeros(0, 3), "flag": True, 3: (1, 2.5, float("nan"))}
        self.ckpt = Checkpointer(
            folder, model=self.models, optimizer=self.optimizers, lr_scheduler=self.schedule, average=self.average,
            count=self.count, log=self.log, empty=self.empty,
        )  # fmt: skip

    def train(self) -> None:
        self.models[0](torch.ones(2, 5)).square().mean().backward()
        self.models[1](torch.ones(2, 3)).square().mean().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.schedule.step()
        for name, p in self.models[0].named_parameters():
            self.average[name].lerp_(p.data, 0.3)
        self.count.at += 1
        self.log.append(self.count.at)

    def facts(self) -> Any:
        average = {k: getattr(v, "full_tensor", v.clone)() for k, v in self.average.items()}
        states = [copy.deepcopy(one.state_dict()) for one in (*self.models, *self.optimizers.values())]
        return average, states, self.schedule.state_dict(), self.count.at, copy.deepcopy(self.log), str(self.empty)


def many(folder: str, saves: bool) -> Any:
    job = Many(folder, 1 if saves else 2)
    job.train()
    job.train()
    if saves:
        job.ckpt.save(2)
    else:
        kept = job.log[2]
        assert job.ckpt.resume() == 2 and job.log[2] is kept
    found = job.facts()
    job.train()
    job.ckpt.close()
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_state_in_every_form(before: int, after: int, tmp_path: Path) -> None:
    expected = run_ranks(before, many, str(tmp_path), True)[0]
    for found in run_ranks(after, many, str(tmp_path), False):
        assert_same(found, expected)


class Renaming(nn.Linear):
    """Has state of its own kind, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.told = 0
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def get_extra_state(self) -> Any:
        return {"told": self.told}

    def set_extra_state(self, state: Any) -> None:
        self.told = state["told"]


@on_ranks(1, 2)
def test_extra_state_and_a_model_in_use(tmp_path: Path) -> None:
    model: Any = bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(Renaming()), Renaming()))
    ckpt = Checkpointer(tmp_path, model=model)
    model[0].told = 3
    before = model.state_dict()["0.weight"].clone()
    ckpt.save(0)
    model[0].told = 4
    with bmt.gathered(model, write=True), torch.no_grad():
        model[0].weight.zero_()
    with bmt.gathered(model):
        if bmt.world_size() > 1:
            with pytest.raises(CheckpointError, match="the model is in use"):
                ckpt.resume()
    assert not model.state_dict()["0.weight"].any()
    model(torch.ones(1, 4))  # what was gathered is near
    ckpt.resume()
    assert model[0].told == 3 and torch.equal(model.state_dict()["0.weight"], before)
    assert torch.equal(model[0](torch.eye(4)).detach(), before.t() + model.state_dict()["0.bias"])
    ckpt.close()


@on_ranks(1, 2, init={"device": "cpu"})  # pinned copies stay
def test_the_copy_of_a_background_save_goes_as_it_is_written(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    host_buffer, write_pieces = Device.host_buffer, storage.write_pieces

    def noted(self: Device, like: torch.Tensor) -> torch.Tensor:
        buffer = host_buffer(self, like)
        made.append(weakref.ref(buffer))
        return buffer

    def counted(pieces: Iterable[storage.Piece]) -> Iterator[storage.Piece]:
        for piece in pieces:
            alive.append(sum(one() is not None for one in made))
            yield piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "host_buffer", noted)
        patch.setattr(storage, "write_pieces", lambda f, r, given, *how: write_pieces(f, r, counted(given), *how))
        job = Job(tmp_path)
        job.train(0, 1)
        job.ckpt.save(1, wait=False)
        job.ckpt.close()
    assert alive[0] == len(made) > 10 and alive[-1] <= 2, (alive, len(made))


@on_ranks(1, 2, init={"schedule": "stress"})
def test_what_is_read_for_a_file_is_the_same_and_alone() -> None:
    device = context().device
    with device.reading() as read:
        for values in (torch.arange(12).view(3, 4).t(), torch.ones(5, dtype=torch.bfloat16), torch.tensor(True)):
            values = values.to(device.torch_device)
            found = read(values)
            assert torch.equal(found, values.cpu()) and found.dtype == values.dtype and found.device.type == "cpu"
            assert found.data_ptr() != values.data_ptr()
        assert not read(torch.empty(0, 3)).numel()


def assert_resumes(job: Job, expected: dict[str, Any]) -> None:
    job.ckpt.resume()
    found = job.facts()
    for name in ("model", "optimizer", "seen"):
        assert_same(found[name], expected[name], name)
    job.ckpt.close()


@pytest.mark.parametrize(("free", "stays"), [(60, True), (0.9, False), (-1, False), (None, False)])
@on_ranks(1, 2, init={"device": "cpu"})
def test_the_copy_stays_on_the_device_where_a_larger_step_leaves_room(
    free: float | None, stays: bool, tmp_path: Path
) -> None:
    """A step takes a GiB; one of twice the size, another."""
    made: list[torch.Size] = []
    job = Job(tmp_path)
    job.train(0, 2)
    engine = context().engine
    plan = engine.plan  # type: ignore[attr-defined]
    try:
        fresh_plan(None if free is None else memory_of(free))
        with pytest.MonkeyPatch.context() as patch:
            host_buffer = Device.host_buffer
            patch.setattr(Device, "host_buffer", lambda *of: (made.append(of[1].shape), host_buffer(*of))[1])
            job.ckpt.save(2, wait=False)
        assert bool(made) != stays
    finally:
        context().device.stand_in = None
        engine.plan = engine.outside._plan = plan  # type: ignore[attr-defined]
    expected = job.facts()
    job.train(3, 4)
    assert_resumes(job, expected)


@on_ranks(2, init={"device": "cpu", "memory": "lean"})
def test_a_lean_job_copies_to_the_host(tmp_path: Path) -> None:
    context().device.stand_in = PLENTY
    assert not context().engine.has_room(1)  # type: ignore[attr-defined]
    context().device.stand_in = None


@on_ranks(1, 2, init={"device": "cpu", "schedule": "stress"})
def test_a_large_part_is_in_several_files(tmp_path: Path) -> None:
    open_file, begun = storage.open_file, Barrier(3)

    def opened(path: Path, mode: str) -> Any:
        if path.suffix == ".distcp" and mode == "wb":
            begun.wait(30)
        return open_file(path, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "open_file", opened)
        patch.setattr(checkpointer, "_LARGE", 1)
        patch.setattr(checkpointer, "_MOST_FILES", 3)
        patch.setattr(checkpointer, "processors", lambda: 64)
        job = Job(tmp_path)
        job.train(0, 1)
        job.ckpt.save(1)
    expected = job.facts()
    assert len(list(tmp_path.glob(f"step-0000000001/__{bmt.rank()}_*.distcp"))) == 3
    job.train(2, 3)
    assert_resumes(job, expected)
