"""Between uses a rank holds one Nth of parameters, gradients and optimizer states: the bytes are counted."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import models
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.shard.unit import ShardUnit, State

WIDTH, LAYERS = 64, 6
ON_CPU = {"device": "cpu"}  # a GPU keeps buffers, and gives them back when all ranks do
PADDING = 128 * 4  # bytes: how far a shard is rounded up, once for each rank and flat buffer


def tall(names: models.Names) -> Any:
    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = names.stack([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)])
            self.head = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)  # type: ignore[no-any-return]

    return Model()


def held() -> int:
    """Bytes of all tensors that are alive in this process, each storage once.

    On a busy machine the threads of a collective may let go of its tensors after it has returned.
    """
    time.sleep(0.05)
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor or isinstance(thing, nn.Parameter):
            with torch._C.DisableTorchFunctionSubclass():
                storage = torch.Tensor.untyped_storage(thing)
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bytes_held(recompute: bool) -> dict[str, int]:
    before = held()
    model = tall(models.sharded(recompute))
    found = {"parameters": held() - before}
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    x = torch.ones(2, WIDTH)
    manager.backward(model(x).sum())
    found["and gradients"] = held() - before
    manager.step()
    found["and states"] = held() - before
    for _ in range(3):
        manager.zero_grad()
        manager.backward(model(x).sum())
        manager.step()
    found["after some steps"] = held() - before
    with torch.no_grad():
        model(x)
    found["after an evaluation"] = held() - before
    model.state_dict()
    found["after a state dict"] = held() - before
    return found


@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_a_rank_holds_its_share(world_size: int, recompute: bool) -> None:
    whole = (LAYERS + 1) * (WIDTH * WIDTH + WIDTH) * 4
    share = whole // world_size
    slack = (LAYERS + 1) * 2 * PADDING
    for found in run_ranks(world_size, bytes_held, recompute, fresh=True, init=ON_CPU):
        expected = {
            "parameters": share, "and gradients": 2 * share, "and states": 4 * share, "after some steps": 4 * share,
            "after an evaluation": 4 * share, "after a state dict": 4 * share,
        }  # fmt: skip
        for name, value in expected.items():
            factor = int(name == "parameters") + 2 * (name == "and gradients") + 4 * (value == 4 * share)
            assert value <= found[name] + slack, (name, found)
            assert found[name] <= value + max(factor, 1) * slack, (name, found, value)


def most_whole(recompute: bool, zero_level: int) -> int:
    """The largest number of blocks that were whole at one time during a step, seen from inside the blocks."""
    model = tall(models.sharded(recompute, zero_level))
    units: list[ShardUnit] = [layer._bmt.unit for layer in model.layers]
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(unit.state is not State.SHARDED for unit in units))

    for layer in model.layers:
        layer[0].register_forward_hook(look)
        layer[0].register_full_backward_hook(look)
    manager = bmt.optim.OptimManager()
    for step in range(3):
        loss = model(torch.ones(2, WIDTH, requires_grad=True)).sum()
        look()
        manager.backward(loss)
        if step == 2:  # unrolled: several forwards before one backward hold no more
            many = sum(model(torch.ones(2, WIDTH)).sum() for _ in range(3))
            look()
            manager.backward(many)  # type: ignore[arg-type]
    assert not any(unit.is_whole for unit in units)
    return most


@pytest.mark.parametrize("recompute", [True, False])
def test_few_blocks_are_whole_at_a_time(recompute: bool) -> None:
    assert all(count <= 3 for count in run_ranks(2, most_whole, recompute, 3))
    assert all(count == LAYERS for count in run_ranks(2, most_whole, recompute, 2)), "ZeRO-2 keeps them"


@on_ranks(1, 2)
def test_blocks_frozen_after_wrapping_reduce_nothing() -> None:
    model = tall(models.sharded())
    for layer in model.layers[:-1]:
        layer.requires_grad_(False)
    calls = []
    for layer in model.layers:
        unit: Any = layer._bmt.unit
        for flat in unit.flats:
            kept = "add_written" if bmt.world_size() == 1 else "receive"  # on one rank it stays where it was written
            inner = getattr(flat.gradient, kept)

            def noted(whole: Any, name: str = unit.name, inner: Any = inner) -> Any:
                calls.append(name)
                return inner(whole)

            setattr(flat.gradient, kept, noted)
    manager = bmt.optim.OptimManager()
    manager.backward(model(torch.ones(2, WIDTH)).sum())
    assert set(calls) == {f"layers.{LAYERS - 1}"}, calls
    for layer in model.layers[:-1]:
        assert all(p.grad is None for p in layer.parameters())
        assert all(flat.gradient._came is None for flat in layer._bmt.unit.flats), "no memory for a gradient"


@on_ranks(1, fresh=True)
def test_on_one_rank_a_cleared_gradient_takes_no_memory() -> None:
    model = tall(models.sharded())
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3))
    head = (WIDTH * WIDTH + WIDTH) * 4
    before, grads = held(), []
    for _ in range(3):
        manager.backward(model(torch.ones(2, WIDTH)).sum())
        part = model.head.weight.grad[0]  # a view that outlives the gradient, as in torch
        expected = part.clone()
        grads.append((part, expected))
        manager.zero_grad()
        manager.zero_grad()
        # The gradient that ``part`` is a view of lives on beside the memory it was in.
        assert held() - before < len(grads) * (2 * head + 2048) + 2048
    assert all(torch.equal(*pair) for pair in grads)


@on_ranks(1, 2, fresh=True, init=ON_CPU)
def test_a_deleted_model_leaves_nothing_behind() -> None:
    before = held()
    model = tall(models.sharded())
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3))
    for _ in range(2):
        manager.backward(model(torch.ones(2, WIDTH)).sum())
        manager.step()
    alive = weakref.ref(model)
    del model, manager
    gc.collect()
    assert alive() is None
    assert held() - before < 4096
