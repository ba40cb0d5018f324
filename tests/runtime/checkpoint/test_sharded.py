"""A script's own dictionary in parts: what it cannot be, then that it is what torch gives."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.checkpoint import (
    Sharded,
    copy_sharded,
    load_sharded,
    load_state_dict,
    remove_sharded,
    rename_sharded,
    save_sharded,
)
from bmtrain.checkpoint.command import main
from bmtrain.checkpoint.sharded import StoredState
from bmtrain.checkpoint.storage import Stored
from bmtrain.errors import CheckpointError


def make(kind: str = "adam", dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5), nn.Linear(5, 5, bias=False)).to(dtype)
    net[3].weight = nn.Parameter(torch.randn(5, 5).to(dtype))
    model = bmt.BMTrainModelWrapper(net)
    optimizer = {
        "adam": lambda: bmt.optim.AdamOptimizer(model.parameters(), lr=0.01),
        "torch": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    }[kind]()
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    return model, optimizer, manager


def train(model: Any, manager: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = bmt.shard_batch(torch.randn(12, 5, generator=torch.Generator().manual_seed(step)))
        loss = model(x.to(model[0].weight.dtype)).square().mean()
        manager.zero_grad()
        manager.backward(loss)
        manager.step()
        losses.append(float(bmt.sum_loss(loss.detach())))
    return losses


def fails(rank: int, path: str) -> None:
    model, optimizer, manager = make()
    train(model, manager, 0, 1)
    good = {"model": Sharded(model), "optimizer": Sharded(optimizer), "step": 1}
    with pytest.raises(CheckpointError, match="pickle"):
        save_sharded({**good, "f": lambda: 1}, path)
    assert not Path(path).exists()
    with pytest.raises(CheckpointError, match="Sharded"):
        save_sharded({**good, "deep": {"model": Sharded(model)}}, path)
    save_sharded(good, path)
    other = make(seed=1)[0][0]
    stored = load_sharded(path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_state_dict(bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(5, 6))), stored["model"])
    assert other is not None
    file = next(Path(path).glob("step-*/__0_0.distcp"))
    data = bytearray(file.read_bytes())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, manager, 1, 2)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    bmt.synchronize()
    if bmt.rank() == 0:
        file.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    bmt.synchronize()
    with pytest.raises(CheckpointError, match="damaged"):
        for name in ("model", "optimizer"):
            load_state_dict({"model": model, "optimizer": optimizer}[name], load_sharded(path)[name])
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items()) and before.keys() == after.keys()


def test_what_cannot_be_saved_or_loaded_is_said_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, fails, 0, str(tmp_path / "last.pt"))


def test_a_folder_that_is_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without a whole checkpoint"):
        load_sharded(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_sharded(tmp_path / "missing.pt")


@on_ranks(1, 2)
def test_without_a_sharded_entry_it_is_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    model, _, _ = make()
    save_sharded({"model": model.state_dict(), "step": 3}, path)
    assert path.is_file() and load_sharded(path, map_location="cpu")["step"] == 3
    twin = make(seed=1)[0]
    load_state_dict(twin, load_sharded(path)["model"])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


class Average:
    """Has a state, and no way to take it back."""

    def state_dict(self) -> dict[str, Any]:
        return {"mean": torch.ones(2)}


@on_ranks(1, 2)
def test_what_has_no_parts_is_an_ordinary_value(tmp_path: Path) -> None:
    model, _, _ = make()
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.__setitem__("more", torch.ones(1)))
    alone = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    state = {
        "hooked": Sharded(model),
        "average": Sharded(Average()),
        "alone": Sharded(alone),
        "last": Sharded(make()[0]),
    }
    save_sharded(state, tmp_path / "last.pt")
    found = load_sharded(tmp_path / "last.pt")
    assert "more" in found["hooked"] and found["average"]["mean"].tolist() == [1, 1]
    assert found["alone"]["param_groups"] == alone.state_dict()["param_groups"] and type(found["last"]) is StoredState
    load_state_dict(alone, found["alone"])


@on_ranks(1, 2)
def test_an_entry_may_have_any_name(tmp_path: Path) -> None:
    names = ("model", "data", "keep", "folder", "self", "model.0", "", "_values", "_values'")
    models = {name: make(seed=seed)[0] for seed, name in enumerate(names)}
    save_sharded({name: Sharded(one) for name, one in models.items()}, tmp_path / "last.pt")
    found = load_sharded(tmp_path / "last.pt")
    for name, one in models.items():
        same(found[name].copy(), dict(one.state_dict()))
        other = make(seed=9)[0]
        load_state_dict(other, found[name])
        same(other.state_dict(), one.state_dict())


def replaced(path: str) -> None:
    """As ``torch.save(state, tmp); os.replace(tmp, path)`` does, between reading and loading."""
    model, optimizer, manager = make()
    save_sharded({"model": Sharded(model), "optimizer": Sharded(optimizer)}, path)
    state = load_sharded(f=path)
    train(model, manager, 0, 1)
    save_sharded(obj={"model": Sharded(model), "optimizer": Sharded(optimizer)}, f=path + ".tmp")
    if bmt.rank() == 0:
        rename_sharded(path + ".tmp", path)
    bmt.synchronize()
    before = model.state_dict()
    with pytest.raises(CheckpointError, match="removed or written again since"):
        load_state_dict(model, state["model"])
    with pytest.raises(CheckpointError, match="damaged"):
        state["model"]["0.bias"]
    same(model.state_dict(), before)
    assert isinstance(state["model"], dict) and isinstance(state["optimizer"], dict)


def test_what_was_replaced_since_it_was_read_is_not_loaded(tmp_path: Path) -> None:
    run_ranks(2, replaced, str(tmp_path / "last.pt"))


def save(path: str, kind: str, dtype: torch.dtype) -> tuple[dict[str, Any], list[float]]:
    Path(path).parent.mkdir(exist_ok=True)
    if bmt.rank() == 0:
        Path(path).write_bytes(b"an older file")
    bmt.synchronize()
    model, optimizer, manager = make(kind, dtype)
    train(model, manager, 0, 3)
    values = {"args": argparse.Namespace(lr=0.1), "best": numpy.float64(0.5), "step": 3, "rng": torch.get_rng_state()}
    state = {"epoch": 1, "model": Sharded(model), "optimizer": Sharded(optimizer), **values}
    save_sharded({**state, "step": 2}, path)
    save_sharded(state, path)
    assert len(list(Path(path).glob("step-*"))) == 1 and Path(path + ".plain").read_bytes() == b"an older file"
    plain = {"epoch": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), **values}
    bmt.save_checkpoint(plain, path + ".torch")
    return torch.load(path + ".torch", weights_only=False), train(model, manager, 3, 6)


def go_on(path: str, kind: str, dtype: torch.dtype) -> list[float]:
    state = load_sharded(path, map_location="cpu", weights_only=False)
    model, optimizer, manager = make(kind, dtype, seed=1)
    drawn = torch.get_rng_state()
    assert str(load_state_dict(model, state["model"])) == "<All keys matched successfully>"
    assert load_state_dict(optimizer, state["optimizer"]) is None
    assert torch.equal(drawn, torch.get_rng_state())
    return train(model, manager, state["step"], 6)


def read_whole(path: str, kind: str, dtype: torch.dtype) -> list[float]:
    """As code that changes what it has read, or copies it, gets it."""
    state = load_sharded(path, weights_only=False)
    model, optimizer, manager = make(kind, dtype, seed=1)
    found = state["model"]
    found["_orig_mod.0.bias"] = found.pop("0.bias")
    for key in list(found):
        if key.startswith("_orig_mod."):
            found[key[len("_orig_mod.") :]] = found.pop(key)
    load_state_dict(model, found)
    load_state_dict(optimizer, dict(state["optimizer"]))
    return train(model, manager, state["step"], 6)


def same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype, where
    elif isinstance(expected, dict):
        assert list(found.keys()) == list(expected.keys()), where
        for key, value in expected.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for one, value in zip(found, expected, strict=True):
            same(one, value, where)
    else:
        assert found == expected and type(found) is type(expected), where


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("adam", torch.float32), ("sgd", torch.float32), ("adam", torch.bfloat16), ("torch", torch.bfloat16)],
)  # fmt: skip
def test_it_is_what_torch_would_give_and_training_goes_on(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    path = str(tmp_path / "run" / "last.pt")
    (plain, losses), *_ = run_ranks(2, save, path, kind, dtype)
    stored = load_sharded(path, weights_only=False)  # also outside of a job
    same(stored, plain)
    torch.save(stored, tmp_path / "again.pt")
    same(torch.load(tmp_path / "again.pt", weights_only=False), plain)
    near = pytest.approx(losses, rel=1e-5 if dtype == torch.float32 else 1e-2)
    for ranks in (2, 1):
        (found, *_) = run_ranks(ranks, go_on, path, kind, dtype)
        assert found == (losses if ranks == 2 else near), ranks
    (found, *_) = run_ranks(2, read_whole, path, kind, dtype)
    assert found == (losses if dtype == torch.float32 else near)  # a file has no masters of torch's optimizers


def save_plain_values(path: str) -> dict[str, Any]:
    model, optimizer, manager = make()
    train(model, manager, 0, 2)
    save_sharded({"state_dict": Sharded(model), "opt": Sharded(optimizer), "scaler": Sharded(manager), "step": 2}, path)
    plain = {"state_dict": model.state_dict(), "opt": optimizer.state_dict(), "scaler": manager.state_dict(), "step": 2}
    bmt.save_checkpoint(plain, path + ".torch")
    return torch.load(path + ".torch")


def test_the_command_makes_the_file_that_torch_would_have(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    plain, *_ = run_ranks(2, save_plain_values, str(path))
    assert main(["convert", str(path), str(tmp_path / "whole.pt"), "--part", "all"]) == 0
    same(torch.load(tmp_path / "whole.pt"), plain)
    (step,) = path.glob("step-*")
    same(load_sharded(step), plain)
    assert not any(name.startswith("scaler.") for name in Stored(step).tensors)  # they are the optimizer's


def test_files_are_copied_renamed_and_removed(tmp_path: Path) -> None:
    one, other, third = (tmp_path / name for name in ("one.pt", "other.pt", "third.pt"))
    run_ranks(2, save_plain_values, str(one))
    expected = load_sharded(one)
    for _ in range(2):  # also over what is there
        copy_sharded(one, other)
        rename_sharded(other, third)
    assert not other.exists() and one.exists()
    same(load_sharded(third), {k: v.copy() if isinstance(v, StoredState) else v for k, v in expected.items()})
    remove_sharded(third)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pt", "one.pt.torch"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "log.txt").touch()
    for move in (copy_sharded, rename_sharded):  # into a folder of the user's, as shutil does
        for _ in range(2):
            copy_sharded(src=str(one), dst=str(other))
            inside = os.path.join(tmp_path / "data", other.name)
            assert move(src=str(other), dst=str(tmp_path / "data")) == inside
            assert load_sharded(inside)["step"] == 2
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["log.txt", "other.pt"]
    copy_sharded(one, other)
    copy_sharded(tmp_path / "one.pt.torch", other)  # a file where a checkpoint in parts was
    assert other.is_file() and torch.load(other)["step"] == 2
    copy_sharded(one, other)
    assert other.is_dir()
    remove_sharded(other)
    with pytest.raises(CheckpointError, match="it stays"):
        remove_sharded(tmp_path / "data")
    copy_sharded(tmp_path / "one.pt.torch", other)
    rename_sharded(other, third)
    remove_sharded(third)
    assert not third.exists()
