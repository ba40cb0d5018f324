"""What does not fit is refused on every rank before anything is loaded, and what would be lost before it is written."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import CheckpointError, ConfigurationError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)  # type: ignore[no-any-return]


class Renaming(Net):
    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:
        if "old" in state_dict:
            state_dict["norm.bias"] = state_dict.pop("old")
        super()._load_from_state_dict(state_dict, *args)  # type: ignore[no-untyped-call]


def make(kind: type[Net] = Net) -> Any:
    torch.manual_seed(0)
    return bmt.BMTrainModelWrapper(kind())


def trained(kind: str = "adam") -> tuple[Any, Any, Any]:
    model = make()
    optimizer: Any = {
        "adam": lambda: bmt.optim.AdamOptimizer(model.parameters(), lr=0.01),
        "torch": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }[kind]()
    manager = bmt.optim.OptimManager(loss_scale=4.0)
    manager.add_optimizer(optimizer, bmt.lr_scheduler.NoDecay(optimizer, 0.01, 2, 10))
    for step in range(2):
        manager.zero_grad()
        manager.backward(oracle.mean(model(oracle.inputs(step))))
        manager.step()
    return model, optimizer, manager


VALUES: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "int64": (lambda v: v.long(), "int64"),
    "bool": (lambda v: v > 0, "bool"),
    "complex": (lambda v: v.to(torch.complex64), "complex64"),
    "meta": (lambda v: v.to("meta"), "meta"),
    "string": (lambda v: "text", "str"),
    "number": (lambda v: 3.0, "float"),
    "none": (lambda v: None, "NoneType"),
    "list": (lambda v: v.tolist(), "list"),
    "transposed": (lambda v: v.t(), "shape"),
    "flat": (lambda v: v.reshape(-1), r"\(24,\)"),
    "sparse": (lambda v: v.to_sparse(), "sparse"),
    "empty": (lambda v: v[:0], r"\(0, "),
}


@on_ranks(1, 2)
def test_what_is_no_model_is_not_saved_or_loaded_as_one(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for given in ({"step": 3}, Net().state_dict(), torch.ones(2), str(path)):
        with pytest.raises(ConfigurationError, match=r"was given a \w+\. .* bmt\.save_checkpoint\(obj, file\)"):
            bmt.save(given, path)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=r"torch\.load\(file, map_location"):
            bmt.load(given, path)  # type: ignore[arg-type]
    assert not path.exists()


@on_ranks(1, 2)
def test_values_of_another_kind_in_a_model() -> None:
    for kind in (Net, Renaming):
        model = make(kind)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for name, (change, said) in VALUES.items():
            wrong = {k: v * 3 if v.is_floating_point() else v for k, v in before.items()}
            wrong["layers.1.1.weight"] = change(wrong["layers.1.1.weight"])
            if kind is Renaming and name in ("int64", "bool", "complex", "sparse", "none"):
                continue  # torch loads these, and a model that changes what it loads may mean it
            with pytest.raises(CheckpointError, match=r"(?i)nothing was loaded") as caught:
                model.load_state_dict(wrong)
            assert "layers.1.1.weight" in str(caught.value), name
            assert kind is Renaming or re.search(said, str(caught.value)), (name, str(caught.value))
            for key, value in model.state_dict().items():
                assert torch.equal(value, before[key]), (name, key)


@on_ranks(1, 2)
def test_averages_of_a_whole_state_dict_load_as_in_torch() -> None:
    """Counters among it are cut off."""
    torch.manual_seed(0)
    plain = Net()
    model = bmt.BMTrainModelWrapper(copy.deepcopy(plain))
    for net in (plain, model):
        average = {k: v.clone() for k, v in net.state_dict().items()}
        for _ in range(3):
            net.train()
            net(torch.ones(4, 6))
            average = {k: 0.5 * v + 0.5 * net.state_dict()[k] for k, v in average.items()}
        net.load_state_dict(average)
    assert model.state_dict()["norm.num_batches_tracked"].dtype == torch.int64
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_what_a_wrapper_has_saved_loads_under_the_names_of_the_model() -> None:
    for kind in (Net, Renaming):
        for strict in (True, False):
            torch.manual_seed(3)
            plain, model = Net(), make(kind)
            with pytest.warns(UserWarning, match=r"'module\.'"):
                found = model.load_state_dict(nn.DataParallel(plain).state_dict(), strict)
            assert not found.missing_keys and not found.unexpected_keys
            oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_a_child_of_that_name_is_no_wrapper() -> None:
    torch.manual_seed(3)
    plain = nn.Sequential()
    plain.module = Net()
    model = bmt.BMTrainModelWrapper(copy.deepcopy(plain))
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({k: v + 1 for k, v in before.items()})
    assert all(torch.equal(v, before[k] + 1) for k, v in model.state_dict().items())


@on_ranks(1, 2)
def test_names_of_which_some_are_a_wrappers_are_refused() -> None:
    model = make()
    state = {k: v for k, v in model.state_dict().items() if "norm" in k}
    state |= {f"module.{k}": v for k, v in model.state_dict().items() if "norm" not in k}
    with pytest.raises(CheckpointError, match=r"module\.layers"):
        model.load_state_dict(state)


@on_ranks(1, 2, 3)
def test_other_precisions_load() -> None:
    model = make()
    state = {k: v.double() if v.is_floating_point() else v.int() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v * 2 for k, v in state.items()})
    assert all(torch.equal(v.double(), state[k].double() * 2) for k, v in model.state_dict().items())


@on_ranks(2, 3)
def test_what_is_no_tensor_is_compared_too() -> None:
    model = make()
    state = dict(model.state_dict())
    if bmt.rank() == 1:
        state["layers.0.0.bias"] = "text"
    with pytest.raises(CheckpointError, match=r"layers\.0\.0\.bias"):
        model.load_state_dict(state)
    state = dict(model.state_dict())
    if bmt.rank() == 1:
        state["more"] = "text"
    with pytest.raises(CheckpointError, match="more"):
        model.load_state_dict(state)


def mistakes(state: dict[str, Any]) -> dict[str, tuple[Callable[[dict[str, Any]], Any], str]]:
    def entry(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda s: s["state"][0].update({name: value})

    moment = state["state"][0]["exp_avg_sq"]
    return {
        **{name: (entry("exp_avg_sq", change(moment)), said) for name, (change, said) in VALUES.items()},
        "step": (entry("step", "two"), "step"),
        "no entry": (lambda s: s["state"].update({0: 3}), "int"),
        "another parameter": (lambda s: s["state"].update({99: s["state"][0]}), "99"),
        "fewer groups": (lambda s: s.update(param_groups=[]), "groups"),
        "no groups": (lambda s: s.pop("param_groups"), "param_groups"),
        "groups": (lambda s: s.update(param_groups=[3]), "params"),
        "no state": (lambda s: s.pop("state"), "'state'"),
        "rate": (lambda s: s["param_groups"][0].update(lr="fast"), "lr"),
    }


@pytest.mark.parametrize("kind", ["adam", "torch"])
@on_ranks(1, 2)
def test_states_of_another_kind_in_an_optimizer(kind: str) -> None:
    _, optimizer, manager = trained(kind)
    before, whole = copy.deepcopy(optimizer.state_dict()), manager.state_dict()
    for name, (change, said) in mistakes(before).items():
        if kind == "torch" and name in ("number", "none", "list"):
            continue
        wrong = copy.deepcopy(optimizer.state_dict())
        for inner in wrong["state"].values():
            inner["exp_avg"].mul_(3)
        change(wrong)
        with pytest.raises(CheckpointError, match=said) as caught:
            optimizer.load_state_dict(wrong)
        assert "nothing was loaded" in str(caught.value), name
        with pytest.raises(CheckpointError, match=said):
            manager.load_state_dict({**whole, "optimizers": [wrong], "loss_scale": 9.0})
        same(optimizer.state_dict(), before)
        assert manager.loss_scale == 4.0


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["param_groups"] == expected["param_groups"]
    for number, entry in expected["state"].items():
        assert all(torch.equal(torch.as_tensor(found["state"][number][k]), torch.as_tensor(entry[k])) for k in entry)


@on_ranks(1, 2)
def test_states_of_another_kind_in_a_manager() -> None:
    _, optimizer, manager = trained()
    whole, before = manager.state_dict(), optimizer.state_dict()
    for change in (
        {"optimizers": None}, {"loss_scale": "four"}, {"lr_schedulers": [{}]}, {"lr_schedulers": []},
        {"lr_schedulers": [{**whole["lr_schedulers"][0], "num_iter": "two"}]}, {"loss_scale_enabled": None},
    ):  # fmt: skip
        wrong = {**whole, **change}
        with pytest.raises((CheckpointError, ValueError)):
            manager.load_state_dict(wrong)
        same(optimizer.state_dict(), before)
    with pytest.raises(CheckpointError):
        manager.load_state_dict([])  # type: ignore[arg-type]
    if bmt.world_size() > 1:
        with pytest.raises(CheckpointError):
            manager.load_state_dict({} if bmt.rank() else whole)
    manager.load_state_dict(whole)
    same(optimizer.state_dict(), before)


@pytest.mark.parametrize("kind", ["adam", "torch"])
@on_ranks(2, 3)
def test_other_states_on_other_ranks_are_not_loaded(kind: str) -> None:
    _, optimizer, _ = trained(kind)
    before = copy.deepcopy(optimizer.state_dict())
    for part in ("moment", "step", "rate", "missing", "kind"):
        state = copy.deepcopy(optimizer.state_dict())
        for inner in state["state"].values():
            inner["exp_avg"].mul_(3)
        if bmt.rank() == bmt.world_size() - 1:
            if part == "moment":
                state["state"][1]["exp_avg"].view(-1).view(torch.int32)[1] ^= 1
            elif part == "step":
                state["state"][1]["step"] = torch.tensor(7.0)
            elif part == "rate":
                state["param_groups"][0]["lr"] = 0.5
            elif part == "missing":
                del state["state"][1]
            else:
                state["state"][1]["exp_avg"] = "text"
        with pytest.raises(CheckpointError, match=r"(?i)nothing was loaded"):
            optimizer.load_state_dict(state)
        same(optimizer.state_dict(), before)


@on_ranks(1, 2, 3)
def test_whole_states_are_what_is_saved(tmp_path: Path) -> None:
    model, optimizer, manager = trained()
    path = os.path.join(tmp_path, "all.pt")
    bmt.save_checkpoint({"manager": manager.state_dict(), "optimizer": optimizer.state_dict()}, path)
    for state in (torch.load(path)["manager"]["optimizers"][0], torch.load(path)["optimizer"]):
        assert [tuple(e["exp_avg"].shape) for e in state["state"].values()] == [
            tuple(p.shape) for p in model.parameters()
        ]
    shards = manager.state_dict(gather_opt=False)
    if bmt.world_size() == 1:
        return
    before = Path(path).read_bytes()
    for lost in (shards, {"a": [shards]}, optimizer.state_dict(gather=False), [0, shards] if bmt.rank() else [0]):
        with pytest.raises(CheckpointError, match="gather_opt=False"):
            bmt.save_checkpoint(lost, path)
    assert Path(path).read_bytes() == before
    manager.load_state_dict(shards)


class Code:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@on_ranks(1, 2)
def test_files_of_nodes_that_differ(tmp_path: Path) -> None:
    """Each rank is given a file of its own, as where nodes have no file system in common."""
    for model in (make(), nn.Linear(6, 4)):
        state = {k: v * 3 for k, v in model.state_dict().items()}
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if bmt.rank():
            state[next(iter(state))][0, 0] += 1
        path = os.path.join(tmp_path, f"{type(model).__name__}{bmt.rank()}.pt")
        torch.save(state, path)
        if bmt.world_size() > 1:
            with pytest.raises(CheckpointError, match="different values"):
                bmt.load(model, path)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        else:
            bmt.load(model, path)


@on_ranks(1, 2)
def test_code_in_a_file_does_not_run_unless_asked_for(tmp_path: Path) -> None:
    model = make()
    path, mark = os.path.join(tmp_path, "code.pt"), tmp_path / "ran"
    state = dict(model.state_dict())
    if bmt.rank() == 0:
        torch.save({**state, "code": Code(str(mark))}, path)
    bmt.synchronize()
    with pytest.raises(CheckpointError, match=r"trust.*weights_only=False"):
        bmt.load(model, path)
    assert not mark.exists()
    bmt.synchronize()
    bmt.load(model, path, strict=False, weights_only=False)
    assert mark.exists()
