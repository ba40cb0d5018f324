"""What rank 0 says of a job, once."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from ranks import on_ranks

import bmtrain as bmt
from bmtrain.block.summary import _mesh
from bmtrain.context import context
from bmtrain.topology import Mesh


@on_ranks(2, fresh=True)
def test_one_block_from_rank_0() -> None:
    model = bmt.BMTrainModelWrapper(torch.nn.Sequential(torch.nn.Linear(600, 800), torch.nn.Linear(800, 1)))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for _ in range(8):  # a GPU's plan measures some
            manager.zero_grad()
            for _ in range(3):
                manager.backward(model(torch.ones(2, 600)).mean())
            manager.step()
    lines = [line for line in said.getvalue().splitlines() if line.startswith("bmtrain: ")]
    if bmt.rank():
        assert not lines
        return
    first, second, batch, third, *plan = lines
    assert len(plan) == context().device.is_apart and all("to spare" in line for line in plan), plan
    assert first.startswith("bmtrain: 481,601 parameters, 480,800 train, in ")
    assert (
        f"{bmt.world_size()} rank{'s' * (bmt.world_size() > 1)}, {context().topology.local_size} on this host" in first
    )
    held = 481_601 * 4 / 2**20 / bmt.world_size()
    trained = held * 480_800 / 481_601
    found = [float(word) for word in second.split() if word.replace(".", "").isdigit()]
    assert found[:3] == pytest.approx([held, trained, 2 * trained], abs=0.11) and "MiB each" in second
    assert batch == "bmtrain: the first step took 3 times 2 x 600 here, 12 rows on all ranks if theirs are as large"
    assert third.startswith("bmtrain: precision as the model and autocast have it; memory auto: ")


@pytest.mark.parametrize(
    "shape, said",
    [
        ((1, 1, 1, 1), ""),
        ((1, 8, 1, 1), ""),
        ((2, 4, 1, 1), ", replicate 2 x shard 4"),
        ((1, 1, 1, 2), ", tensor 2"),
        ((1, 2, 2, 2), ", shard 2 x pipe 2 x tensor 2"),
    ],
)
def test_a_mesh_is_named_where_it_is_more_than_shards(shape: tuple[int, int, int, int], said: str) -> None:
    assert _mesh(Mesh(shape, 0)) == said
