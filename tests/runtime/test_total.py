"""``bmt.total`` and ``bmt.gather_samples``: what a loop makes of its share of a batch becomes the batch's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from ranks import on_ranks
from torch.utils.data import DataLoader

import bmtrain as bmt
from bmtrain.errors import ConfigurationError


def test_before_the_ranks_are_there_a_value_is_ones_own() -> None:
    values: list[Any] = [3, 0.5, [1, "a"], (1,), torch.arange(2), numpy.arange(2)]
    for value in values:
        assert bmt.total(value) is value and bmt.gather_samples(value) is value


@on_ranks(1, 2, 3)
def test_the_ranks_shares_make_the_batch() -> None:
    batches = list(DataLoader(range(7), batch_size=7))
    mine = next(iter(bmt.shard_loader(DataLoader(range(7), batch_size=7))))
    whole: torch.Tensor = batches[0]

    counted = bmt.total(len(mine))
    assert counted == 7 and type(counted) is int
    assert bmt.total(float(mine.sum())) == float(whole.sum())
    assert bmt.total(mine.double().sum()).equal(whole.double().sum())
    assert bmt.total((mine == 2).any()) == 1
    assert bmt.total(mine.cpu().numpy().sum()) == whole.sum()
    assert bmt.total(numpy.ones(2)).tolist() == [float(bmt.world_size())] * 2

    assert bmt.gather_samples(mine).equal(whole)
    rows = bmt.gather_samples(torch.stack([mine, mine], 1).float().requires_grad_())
    assert rows.detach().equal(torch.stack([whole, whole], 1).float())
    assert rows.requires_grad == (bmt.world_size() == 1)
    assert bmt.gather_samples(mine.tolist()) == whole.tolist()
    assert bmt.gather_samples(tuple(map(str, mine.tolist()))) == tuple(map(str, whole.tolist()))
    assert bmt.gather_samples(mine.cpu().numpy()).tolist() == whole.tolist()
    assert bmt.gather_samples(numpy.array(["a"] * len(mine))).tolist() == ["a"] * 7
    mean = (bmt.world_size() - 1) / 2
    assert bmt.gather_samples(float(bmt.rank())) == mean
    assert bmt.gather_samples(torch.tensor(float(bmt.rank()))).item() == mean


@on_ranks(2)
def test_the_loader_tells_whether_batches_are_shares() -> None:
    loader = DataLoader(range(4), batch_size=2)
    assert bmt.total(1, of=loader) == 1 and bmt.total(1, of=[1, 2]) == 1
    assert bmt.total(1, of=bmt.shard_loader(loader)) == 2
    assert bmt.gather_samples([1], of=loader) == [1]

    class Bar:
        iterable = bmt.shard_loader(loader)

    assert bmt.total(1, of=Bar()) == 2


@on_ranks(2)
def test_what_wraps_the_loader_tells_it_too() -> None:
    class Wrapper:
        def __init__(self, loader: object) -> None:
            self.it, self.name = loader, "train"

        def __iter__(self) -> object:
            return iter(self.it)  # type: ignore[call-overload]

    def endless(loader: DataLoader[int]) -> object:
        while True:
            yield from loader

    whole = DataLoader(range(4), batch_size=2)
    shared = bmt.shard_loader(whole)
    wraps = {
        "an object": Wrapper,
        "two objects": lambda loader: Wrapper(Wrapper(loader)),
        "enumerate": enumerate,
        "zip": lambda loader: zip(range(9), loader, strict=False),
        "iter": iter,
        "enumerate of iter": lambda loader: enumerate(iter(loader)),
        "islice": lambda loader: itertools.islice(loader, 1),
        "chain": lambda loader: itertools.chain(loader, loader),
        "map": lambda loader: map(tuple, loader),
        "a generator": endless,
    }
    found = {name: (bmt.total(1, of=wrap(shared)), bmt.total(1, of=wrap(whole))) for name, wrap in wraps.items()}
    assert found == dict.fromkeys(wraps, (2, 1))


@on_ranks(2)
def test_rows_of_different_shapes_are_refused_on_all_ranks() -> None:
    with pytest.raises(ConfigurationError, match="pad them"):
        bmt.gather_samples(torch.zeros(2, 3 + bmt.rank()))
    with pytest.raises(ConfigurationError, match="takes tensors"):
        bmt.gather_samples({})


@on_ranks(2, init={"tp_size": 2})
def test_tensor_parallel_ranks_count_once() -> None:
    mine = next(iter(bmt.shard_loader(DataLoader(range(7), batch_size=7))))
    assert len(mine) == 7
    assert bmt.total(len(mine)) == 7 and bmt.total(float(mine.sum())) == 21.0
    assert bmt.total(mine.sum()).item() == 21 and bmt.total(mine.double().sum()).item() == 21.0
    assert bmt.gather_samples(mine).equal(mine)
    assert bmt.gather_samples(mine.tolist()) == mine.tolist()
    assert bmt.gather_samples(numpy.array(["a"] * 7)).tolist() == ["a"] * 7
    values = mine.float().requires_grad_()
    loss = bmt.mean(values)
    assert loss.item() == 3.0
    loss.backward()
    torch.testing.assert_close(values.grad, torch.full((7,), 1 / 7))


@on_ranks(1, 2, 3)
def test_an_array_of_losses_is_averaged_one_by_one() -> None:
    mine = numpy.array([float(bmt.rank()), 1.0], dtype=numpy.float32)
    found = bmt.sum_loss(mine)
    assert found.dtype == numpy.float32 and found.tolist() == [(bmt.world_size() - 1) / 2, 1.0]
    assert bmt.sum_loss(mine, count=2).tolist() == found.tolist()


@on_ranks(1, 2, 3)
def test_a_dict_of_losses_is_averaged_one_by_one() -> None:
    mine = float(bmt.rank())
    mean = (bmt.world_size() - 1) / 2
    found = bmt.sum_loss({"box": torch.tensor(mine), "lr": mine, "parts": {"a": torch.tensor([mine, 1.0])}})
    assert list(found) == ["box", "lr", "parts"]
    assert found["box"].item() == mean and found["lr"] == mean and found["parts"]["a"].tolist() == [mean, 1.0]
