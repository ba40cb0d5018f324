"""Ranks as a grid of named dimensions."""

from __future__ import annotations

import os
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from ranks import on_ranks, run_ranks

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError, NotInitializedError
from bmtrain.topology import Mesh, Topology


@pytest.mark.parametrize("size", [0, -1, 3, 5, 8, 2.0, True])
def test_groups_that_are_not_equally_large_are_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"shard_size is .* one of \[1, 2, 4\]"):
        Topology(rank=0, world_size=4, shard_size=size)


def test_tensor_parallel_ranks_see_the_same_data() -> None:
    with pytest.raises(ConfigurationError, match=r"the 2 ranks that see different data.* one of \[1, 2\]"):
        Topology(rank=0, world_size=4, tp_size=2, shard_size=4)


def test_a_dimension_that_there_is_not() -> None:
    mesh: Any = Mesh((1, 2, 1, 1), 0)
    with pytest.raises(ConfigurationError, match="replicate, shard, pipe, tensor, not 'dp'"):
        mesh.size("dp")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 1), (4, 1, 1, 1), (2, 2, 1, 1), (2, 3, 1, 2), (2, 2, 3, 2)])
def test_groups_part_the_ranks(shape: tuple[int, int, int, int]) -> None:
    """As torch cuts its DeviceMesh: along any dimensions, every rank is in one group, at its own place."""
    grid = torch.arange(Mesh(shape, 0).size()).view(shape)
    for rank in range(Mesh(shape, 0).size()):
        mesh = Mesh(shape, rank)
        assert grid[mesh.get_coordinate()] == rank == mesh.get_rank()
        for name, size, here in zip(mesh.mesh_dim_names, shape, mesh.get_coordinate(), strict=True):
            assert (mesh.size(name), mesh.get_local_rank(name)) == (size, here)
            assert mesh.group(name)[here] == rank
        for chosen in product((True, False), repeat=4):
            index = tuple(
                slice(None) if free else here for free, here in zip(chosen, mesh.get_coordinate(), strict=True)
            )
            names = [name for name, free in zip(mesh.mesh_dim_names, chosen, strict=True) if free]
            assert mesh.group(*names) == grid[index].flatten().tolist()


def test_of_a_topology() -> None:
    here = Topology(rank=13, world_size=24, tp_size=2, pipe_size=3, shard_size=2)
    assert here.mesh == Mesh((2, 2, 3, 2), 13)
    assert (here.data_rank, here.data_size, here.shard_rank, here.pipe_rank, here.tp_rank) == (6, 12, 0, 0, 1)
    assert here.data_ranks == list(range(0, 24, 2)) and here.pipeline == 2
    with pytest.raises(ConfigurationError, match=r"the 4 ranks that see different data of a stage.*\[1, 2, 4\]"):
        Topology(rank=13, world_size=24, tp_size=2, pipe_size=3, shard_size=3)
    assert Topology(rank=1, world_size=6).mesh == Mesh((1, 6, 1, 1), 1)


@on_ranks(1, initialize=False)
def test_before_there_is_one() -> None:
    with pytest.raises(NotInitializedError):
        bmt.mesh()


def facts() -> Any:
    ctx = context()
    mesh = bmt.mesh()
    groups = [ctx.world, ctx.control, ctx.shard_group, ctx.replicate_group]
    groups += [ctx.collectives.gather, ctx.collectives.reduce]
    return mesh.shape, mesh.get_coordinate(), [(group.rank, group.world_size) for group in groups]


def test_communicators_are_those_of_the_mesh() -> None:
    assert [one[0] for one in run_ranks(2, facts)] == [(1, 2, 1, 1)] * 2
    for shape in ((2, 1), (2, 2)):
        found = run_ranks(shape[0] * shape[1], facts, init={"shard_size": shape[1]})
        for rank, (mesh, (replica, shard, *_), groups) in enumerate(found):
            assert mesh == (*shape, 1, 1) and (replica, shard) == divmod(rank, shape[1])
            world, copy = (rank, len(found)), (shard, shape[1])
            assert groups == [world, world, copy, (replica, shape[0]), copy, copy]


@on_ranks(2, initialize=False, fresh=True)
def test_ranks_that_ask_for_different_groups() -> None:
    with pytest.raises(ConfigurationError, match="must be the same on all ranks"):
        bmt.init_distributed(device="cpu", shard_size=[1, 2][int(os.environ["RANK"])])
    with pytest.raises(ConfigurationError, match="shard_size is 3, which does not divide the 2 ranks"):
        bmt.init_distributed(device="cpu", shard_size=3)


@on_ranks(2, env={"BMTRAIN_TP_SIZE": "2"}, fresh=True)
def test_the_launch_says_how_many_ranks_hold_slices() -> None:
    assert bmt.mesh().size("tensor") == 2


@on_ranks(2, env={"BMTRAIN_TP_SIZE": "2"}, init={"tp_size": 1}, fresh=True)
def test_an_argument_goes_before_the_launch() -> None:
    assert bmt.mesh().size("tensor") == 1


@on_ranks(1, env={"BMTRAIN_TP_SIZE": "two"}, initialize=False, fresh=True)
def test_a_launch_that_says_no_number() -> None:
    with pytest.raises(ConfigurationError, match="BMTRAIN_TP_SIZE is 'two'; it must be an integer"):
        bmt.init_distributed(device="cpu")


@pytest.mark.parametrize("name", ["BMTRAIN_WATCH", "BMTRAIN_GRAPHS"])
@on_ranks(1, initialize=False, fresh=True)
def test_a_switch_is_on_or_off(name: str) -> None:
    for value in ("false", "off", "2", "yes"):
        os.environ[name] = value
        with pytest.raises(ConfigurationError, match=f"{name} is '{value}'; it must be 0 or 1"):
            bmt.init_distributed(device="cpu")
    os.environ[name] = ""
    bmt.init_distributed(device="cpu")


@on_ranks(1, initialize=False, fresh=True)
def test_a_variable_by_nearly_the_name_of_one() -> None:
    near = {
        "BMTRAIN_METR": "BMTRAIN_METER", "BMTRAIN_TPSIZE": "BMTRAIN_TP_SIZE", "BMTRAIN_GRAPH": "BMTRAIN_GRAPHS",
        "BMTRAIN_DIARYDIR": "BMTRAIN_DIARY_DIR", "bmtrain_watch": "BMTRAIN_WATCH", "BMTRAIN_TOKENS": "BMTRAIN_TOKEN",
    }  # fmt: skip
    others = ["BMTRAIN_HOME", "BMTRAIN_EXTENSION", "BMTRAIN_TEST_DEVICE", "BMTRAIN_DATA_DIR", "METER"]
    os.environ.update(dict.fromkeys([*near, *others], "x"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bmt.init_distributed(device="cpu")
    said = [str(warning.message) for warning in caught if "did you mean" in str(warning.message)]
    assert sorted(said) == sorted(
        f"{name} is in the environment, which nobody reads; did you mean {right}?" for name, right in near.items()
    )
