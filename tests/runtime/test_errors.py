"""What a user does wrong is told: which error, and what to do."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import RanksFailed, on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain import errors
from bmtrain.context import context
from bmtrain.topology import Topology


def test_every_error_is_in_the_tree_and_is_a_builtin_too() -> None:
    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.BMTrainError)]
    assert len(own) > 5
    for error in own:
        assert error.__name__ in (errors.__doc__ or "")
        if error is not errors.BMTrainError:
            assert issubclass(error, (RuntimeError, ValueError, NotImplementedError, FloatingPointError)), error


@on_ranks(1, initialize=False, fresh=True)
def test_use_before_init() -> None:
    for use in (
        lambda: bmt.DistributedParameter(torch.ones(2)),
        lambda: type("M", (bmt.DistributedModule,), {})(),
        lambda: bmt.Block(nn.Linear(2, 2)),
        lambda: bmt.TransformerBlockList([nn.Linear(2, 2)]),
        lambda: bmt.BMTrainModelWrapper(nn.Linear(2, 2)),
        lambda: bmt.optim.OptimManager(),
        lambda: bmt.synchronize(),
        lambda: bmt.sum_loss(torch.ones(())),
    ):
        with pytest.raises(errors.NotInitializedError, match="init_distributed"):
            use()
    assert bmt.rank() == 0 and bmt.world_size() == 1 and not bmt.is_initialized()


def bad_init() -> None:
    for arguments, error, said in (
        ({"tp_size": 3}, errors.ConfigurationError, "not divisible"),
        ({"pipe_size": 3}, errors.ConfigurationError, "not divisible"),
        ({"num_micro_batches": 0}, errors.ConfigurationError, "num_micro_batches must be"),
        ({"device": "cuda"}, errors.DeviceError, "no GPU"),
        ({"device": "tpu"}, errors.DeviceError, "device must be"),
        ({"unknown": 1}, TypeError, "unknown"),
    ):
        with pytest.raises(error, match=said):
            bmt.init_distributed(**arguments)
        assert not bmt.is_initialized(), "a failed init leaves nothing behind"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bmt.init_distributed(device="cpu", zero_level=3)
    assert any("zero_level" in str(w.message) for w in caught)
    with pytest.raises(errors.ConfigurationError, match="already"):
        bmt.init_distributed(device="cpu")


def test_bad_arguments_of_init() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    run_ranks(2, bad_init, initialize=False, fresh=True)


def bad_environment() -> None:
    with pytest.raises(errors.ConfigurationError, match="RANK"):
        bmt.init_distributed()


def test_bad_environment() -> None:
    run_ranks(1, bad_environment, initialize=False, fresh=True, env={"RANK": "three"})
    run_ranks(1, bad_environment, initialize=False, fresh=True, env={"RANK": "3"})


@on_ranks(1, initialize=False, fresh=True, env={"WORLD_SIZE": "2"}, timeout=60)
def test_ranks_that_cannot_meet() -> None:
    with pytest.raises(errors.CommunicationError, match="MASTER_ADDR"):
        bmt.init_distributed(device="cpu", timeout=timedelta(seconds=2))


def test_topology() -> None:
    here = Topology(rank=5, world_size=8, tp_size=2, pipe_size=2)
    assert (here.tp_rank, here.pipe_rank, here.data_rank, here.data_size, here.pipeline) == (1, 0, 2, 4, 1)
    assert here.tp_group() == [4, 5] and here.pipe_group() == [5, 7]
    with pytest.raises(errors.ConfigurationError, match="multiple of 4"):
        Topology(rank=0, world_size=6, tp_size=2, pipe_size=2)


@on_ranks(1, 2)
def test_modules_that_cannot_be_sharded() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(errors.ConfigurationError, match="lazy"):
        bmt.BMTrainModelWrapper(lazy)
    with pytest.raises(errors.ConfigurationError, match="takes a torch"):
        bmt.Block([nn.Linear(2, 2)])
    with pytest.raises(errors.ConfigurationError, match="zero_level"):
        bmt.Block(nn.Linear(2, 2), zero_level=1)
    with pytest.raises(errors.ConfigurationError, match="mode"):
        bmt.Block(nn.Linear(2, 2), mode="PIPES")
    with pytest.raises(errors.ConfigurationError, match="num_hidden"):
        bmt.TransformerBlockList([nn.Linear(2, 2)], num_hidden=0)
    pairs = bmt.TransformerBlockList([nn.Linear(2, 2)], num_hidden=2)
    with pytest.raises(errors.ConfigurationError, match="2 hidden"):
        pairs(torch.ones(2, 2))
    if torch.cuda.is_available():
        return
    with pytest.raises((errors.DeviceError, RuntimeError, AssertionError)):
        bmt.Block(nn.Linear(2, 2)).to("cuda")


# ---- ranks that part
# -------------------------------------------------------------------------------------------------------------------


def deep(names: models.Names) -> Any:
    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = names.stack([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)])

        def forward(self, x: torch.Tensor, which: list[int]) -> torch.Tensor:
            for index in which:
                x = self.layers[index](x)
            return x

    return Model()


def diverge(kind: str, warm: int) -> str:
    """Rank 1 runs other blocks than rank 0; what each rank is told."""
    engine: Any = context().engine
    engine.schedule.trace._patience = timedelta(seconds=3)
    model = deep(models.sharded(recompute=kind != "no recompute"))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(warm):
        manager.backward(oracle.mean(model(torch.ones(2, 6), [0, 1, 2, 3])))
        manager.step()
    parted = {"skip": [0, 2, 3], "exit": [0, 1], "order": [0, 2, 1, 3], "no recompute": [0, 1, 3]}[kind]
    start = time.monotonic()
    try:
        manager.backward(oracle.mean(model(torch.ones(2, 6), parted if bmt.rank() else [0, 1, 2, 3])))
    except errors.RankDivergenceError as error:
        assert time.monotonic() - start < 20
        return str(error)
    return "no error"


@pytest.mark.parametrize(("kind", "warm"), [("skip", 2), ("exit", 2), ("order", 0), ("no recompute", 0)])
def test_ranks_that_run_different_blocks_are_told(kind: str, warm: int) -> None:
    try:
        said = run_ranks(2, diverge, kind, warm, timeout=40, fresh=True, init={"device": "cpu"})
    except RanksFailed as failure:
        raise AssertionError(f"a rank hung or raised something else: {failure}") from None
    assert all("Rank" in text and "layers." in text for text in said), said


def stopped(rank: int) -> str:
    model = deep(models.sharded())
    if bmt.rank() == rank:
        return "stopped"
    try:
        context().engine.schedule.trace._patience = timedelta(seconds=2)  # type: ignore[attr-defined]
        model(torch.ones(2, 6), [0, 1])
    except (errors.RankDivergenceError, errors.CommunicationError) as error:
        return str(error)
    return "no error"


def test_a_rank_that_stops_is_named() -> None:
    said = run_ranks(2, stopped, 1, timeout=40, fresh=True)
    assert said[1] == "stopped" and "rank 1 did not" in said[0], said
