"""Where training is in its data: another run goes on with the sample that comes next, at any number of ranks."""

from __future__ import annotations

import gc
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import bmtrain as bmt
from bmtrain.checkpoint import Checkpointer, ResumableLoader
from bmtrain.errors import CheckpointError


class Numbers(Dataset[int]):
    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 34

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(34))


class Drawing(Sampler[int]):
    """Draws its order from all generators as an epoch begins."""

    def __len__(self) -> int:
        return 34

    def __iter__(self) -> Iterator[int]:
        first = random.randrange(34) + int(numpy.random.randint(34)) + int(torch.randint(34, ()))
        return iter([(first + 5 * index) % 34 for index in range(34)])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(Numbers(), batch_size=6, shuffle=True),
    "drawing": lambda: DataLoader(Numbers(), batch_size=6, sampler=Drawing()),
    "generator": lambda: DataLoader(Numbers(), batch_size=6, shuffle=True, generator=seeded()),
    "stream": lambda: DataLoader(Stream(), batch_size=6),
    "single": lambda: DataLoader(Numbers(), batch_size=None, shuffle=True),
    "workers": lambda: DataLoader(
        Numbers(), batch_size=6, shuffle=True, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    ),
}


def batches_of(name: str, folder: str, stop: int | None, resume: bool) -> list[list[int]]:
    """What this rank sees of three epochs, saving at batch ``stop`` of them all and ending there."""
    loader = LOADERS[name]()
    if name != "single":
        loader = bmt.shard_loader(loader)
    resumable = ResumableLoader(loader)
    ckpt = Checkpointer(os.path.join(folder, name), data=resumable)
    if resume:
        torch.manual_seed(99)
        random.seed(99)
        assert ckpt.resume() == stop
    seen = []
    for _ in range(resumable.epoch, 3):
        for batch in resumable:
            seen.append(torch.as_tensor(batch).view(-1).tolist())
            torch.rand(3)  # the model's own draws
            random.random()
            if not resume and resumable.total == stop:
                ckpt.save(stop)
                ckpt.close()
                return seen
    ckpt.close()
    return seen


def all_of(folder: str, stop: int | None, resume: bool) -> dict[str, list[list[int]]]:
    found = {}
    for name in LOADERS:
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        found[name] = batches_of(name, folder, stop, resume)
        gc.collect()  # workers end with their loader
    return found


CPU = {"device": "cpu"}  # workers collate numbers, and cannot put them on a GPU


def joined(results: list[dict[str, list[list[int]]]], name: str) -> list[list[int]]:
    if name == "single":
        return results[0][name]
    together = zip(*(result[name] for result in results), strict=True)
    return [list(itertools.chain.from_iterable(parts)) for parts in together]


@pytest.mark.parametrize(("before", "after", "stop"), [(2, 3, 2), pytest.param(1, 1, 8, marks=pytest.mark.long)])
def test_the_next_batch_is_the_next_one(tmp_path: Path, before: int, after: int, stop: int) -> None:
    straight = run_ranks(1, all_of, str(tmp_path / "straight"), None, False, init=CPU)
    first = run_ranks(before, all_of, str(tmp_path / str(stop)), stop, False, init=CPU)
    rest = run_ranks(after, all_of, str(tmp_path / str(stop)), stop, True, init=CPU)
    for name in LOADERS:
        assert joined(first, name) + joined(rest, name) == joined(straight, name), name


@on_ranks(1, 2)
def test_batches_before_are_not_read_and_plain_iteration_is_the_loaders() -> None:
    data = Numbers()
    loader = ResumableLoader(DataLoader(data, batch_size=6))
    assert len(loader) == 6 and loader.batch_size == 6 and loader.dataset is data
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in DataLoader(Numbers(), batch_size=6)]
    assert (loader.epoch, loader.batches, loader.total) == (1, 0, 6)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    other = ResumableLoader(DataLoader(data, batch_size=6))
    other.load_state_dict(state)
    data.read.clear()
    assert (other.epoch, other.batches, other.total) == (1, 2, 8)
    assert [int(batch[0]) for batch in other] == [12, 18, 24, 30] and min(data.read) == 12
    assert [int(batch[0]) for batch in other] == [0, 6, 12, 18, 24, 30], "once only"


class Own:
    """As torchdata's StatefulDataLoader: each rank has its own state."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "where": torch.tensor([self.at])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def own(folder: str, at: int | None) -> int:
    data = Own()
    ckpt = Checkpointer(folder, data=data)
    if at is not None:
        data.at = at + bmt.rank()
        ckpt.save(1)
    else:
        ckpt.resume()
    ckpt.close()
    return data.at


def refused(folder: str) -> None:
    ckpt = Checkpointer(folder, data=Own())
    with pytest.raises(CheckpointError, match=r"data was saved by 2 ranks.*ResumableLoader"):
        ckpt.resume()
    ckpt.close()


def test_each_rank_gets_its_own_position_back(tmp_path: Path) -> None:
    run_ranks(2, own, str(tmp_path), 5)
    assert run_ranks(2, own, str(tmp_path), None) == [5, 6]
    run_ranks(3, refused, str(tmp_path))
