"""Ranks collect garbage each in its own time; what depends on it happens on all of them together."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.objects import allgather_objects

WIDTH = 12


def trained() -> Any:
    model = bmt.BMTrainModelWrapper(nn.Sequential(*[bmt.CheckpointBlock(nn.Linear(WIDTH, WIDTH)) for _ in range(3)]))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3))
    for _ in range(2):
        manager.zero_grad()
        manager.backward(model(torch.ones(2, WIDTH, device=context().device.torch_device)).sum())
        manager.step()
    return model


@on_ranks(2, 3, init={"schedule": "stress"})
def test_a_model_that_one_rank_has_not_collected_yet() -> None:
    pools = context().engine.schedule.pools  # type: ignore[attr-defined]
    for turn in range(4):
        model = trained()
        model.itself = [model]  # goes with the garbage collector only
        del model
        if turn % bmt.world_size() == bmt.rank():
            gc.collect()
        # Ranks that took memory differently would be apart here, and, on GPUs, would wait for each other for ever.
        every = allgather_objects((pools.arenas._count, context().diary.count))
        assert all(one == every[0] for one in every), every


@on_ranks(2)
def test_what_is_whole_stays_alike_where_ranks_collect_in_their_own_time() -> None:
    whole = context().engine.whole  # type: ignore[attr-defined]
    with mock.patch.object(type(context().device), "overlaps", True):
        model = trained()
    model.itself = [model]
    del model
    if bmt.rank() == 0:
        gc.collect()
    # It decides what is released next, and so what all ranks gather.
    every = allgather_objects(sorted(whole._units))
    assert every[0] and every[0] == every[1]


@on_ranks(2, init={"schedule": "stress"}, fresh=True)
def test_what_nobody_uses_is_given_back_at_once() -> None:
    pools = context().engine.schedule.pools  # type: ignore[attr-defined]
    model = trained()  # whose last step begins the next one's gathers
    assert pools.params._idle
    del model
    gc.collect()
    pools.arenas.collect()
    assert not pools.params._idle and not pools.grads._idle and not pools.arenas._unused
