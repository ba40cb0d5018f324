"""A state dict that was kept over a step says so when it is read, where torch's would show what is there now."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from test_adam_view import build
from test_shown_state import managed, train

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ShardedAccessError

heard = partial(oracle.heard, "taken before")


KINDS: dict[str, Any] = {
    "AdamOptimizer": bmt.optim.AdamOptimizer, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD,
    "Muon": torch.optim.Muon,
}  # fmt: skip


def made(kind: str, params: Any) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"SGD": {"momentum": 0.9}, "Adam": {"eps": 1e-4}, "AdamOptimizer": {"eps": 1e-4}}
    return KINDS[kind](list(params), lr=1e-2, **options.get(kind, {}))  # type: ignore[no-any-return]


def matrices(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.dim() == 2]


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_no_step_has_changed_are_read_in_silence(kind: str, dtype: torch.dtype) -> None:
    model = bmt.BMTrainModelWrapper(build().to(dtype))
    kept = model.state_dict()
    head, body = made(kind, [model[2].weight]), made(kind, [model[0].weight])
    managers = managed(head), managed(body)
    with heard() as found:
        x = oracle.inputs(0).to(context().device.torch_device, dtype)
        managers[0].backward(oracle.mean(model(x.chunk(bmt.world_size())[bmt.rank()])))
        managers[0].step()
        for name in ("0.weight", "0.bias", "2.bias"):
            kept[name].float().sum()
    assert found == []
    with heard() as found:
        kept["2.weight"].sum()
    assert len(found) == 1 and "model.state_dict()" in found[0]


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_optimizers_state_dict_that_was_kept_over_a_step(kind: str) -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = made(kind, matrices(model))
    manager = managed(optimizer)
    train(model, manager)
    with heard() as found:
        kept, copied = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
        stored = pickle.loads(pickle.dumps(kept))
        assert all(type(value) is torch.Tensor for one in (copied, stored) for value in one["state"][0].values())
        manager.state_dict()
        train(model, manager, 1)
        name = next(name for name in copied["state"][0] if name != "step")
        assert kept["state"][0][name].shape == copied["state"][0][name].sum(1).shape + (6,)
    assert found == []
    live = bmt.world_size() == 1 and kind != "AdamOptimizer"  # as torch's
    with heard() as found:
        same = torch.equal(kept["state"][0][name], copied["state"][0][name])
    assert same != live and len(found) == (not live) and all("optimizer.state_dict()" in one for one in found)
    with heard() as found:
        optimizer.load_state_dict(kept)
    assert live or found
    with heard() as found:
        optimizer.load_state_dict(copied)
        train(model, manager, 1)
    assert found == []


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["AdamOptimizer", "Adam", "SGD"])
def test_writes_to_an_optimizers_state_dict_are_torchs(kind: str) -> None:
    plain, model = build().to(context().device.torch_device), bmt.BMTrainModelWrapper(build())
    theirs = made("Adam" if kind == "AdamOptimizer" else kind, plain.parameters())
    ours = made(kind, model.parameters())
    manager = managed(ours)
    for step in range(4):
        theirs.zero_grad()
        oracle.mean(plain(oracle.inputs(step).to(context().device.torch_device))).backward()
        theirs.step()
        train(model, manager, step)
        for optimizer in (theirs, ours):
            for state in optimizer.state_dict()["state"].values():
                for name, value in state.items():
                    if name == "step":
                        value.add_(step == 1)
                    elif value.dim() == 2:
                        value.mul_(0.5)
                        value[0].mul_(0.5)
    oracle.assert_same_weights(model, plain)


@on_ranks(2)
def test_a_write_to_what_one_rank_keeps_is_refused() -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = made("Muon", matrices(model))
    train(model, managed(optimizer))
    for write in (torch.Tensor.zero_, lambda value: value.mul_(0.5), lambda value: value[0].zero_()):
        for state in optimizer.state_dict()["state"].values():
            for value in state.values():
                with pytest.raises(ShardedAccessError, match="load_state_dict"):
                    write(value)
