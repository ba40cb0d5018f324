"""Shares of global batches: put together again, they are what one process would have seen."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from ranks import run_ranks
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    WeightedRandomSampler,
)

import bmtrain as bmt
from bmtrain.errors import ConfigurationError


class Numbers(Dataset[tuple[torch.Tensor, str]]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return torch.tensor([index, -index]), f"sample {index}"


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(11)


class Pair(NamedTuple):
    tokens: torch.Tensor
    names: list[str]


class Batches(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for start in (0, 10):
            tokens = torch.arange(start, start + 5)
            yield {"pair": Pair(tokens, [f"n{i}" for i in tokens.tolist()]), "scale": torch.tensor(2.0), "step": start}


class Drawing(Sampler[list[int]]):
    """Draws anew for every batch, from all three generators."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(4):
            yield [
                int(torch.randint(100, ())),
                random.randrange(100),
                int(numpy.random.randint(100)),
                int(torch.randint(100, ())),
            ]

    def __len__(self) -> int:
        return 4


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(23), batch_size=6, shuffle=True, **options)


def with_generator() -> DataLoader[Any]:
    return shuffled(generator=torch.Generator().manual_seed(9))


def weighted() -> DataLoader[Any]:
    sampler = WeightedRandomSampler(torch.linspace(0, 1, 23).tolist(), 40)
    return DataLoader(Numbers(23), sampler=sampler, batch_size=5, drop_last=True)


def in_order() -> DataLoader[Any]:
    return DataLoader(Numbers(11), batch_size=4, collate_fn=list)


def own_batches() -> DataLoader[Any]:
    return DataLoader(Numbers(100), batch_sampler=BatchSampler(range(0, 100, 7), 4, drop_last=False))


def drawing() -> DataLoader[Any]:
    return DataLoader(Numbers(100), batch_sampler=Drawing())


def workers() -> DataLoader[Any]:
    return shuffled(num_workers=1)


LOADERS: list[Callable[[], DataLoader[Any]]] = [
    shuffled,
    with_generator,
    weighted,
    in_order,
    own_batches,
    drawing,
    workers,
]


def indices(batch: Any) -> list[int]:
    rows = [sample[0] for sample in batch] if isinstance(batch[0], tuple) else batch[0]
    return [int(row[0]) for row in rows]


def two_epochs(make: Callable[[], DataLoader[Any]], share: bool, disturb: bool = False) -> dict[str, Any]:
    """Indices of two epochs, and the state of the process's generator at the end."""
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    loader = bmt.shard_loader(make()) if share else make()
    if disturb:  # ranks that have drawn differently before, as a model with dropout does
        torch.rand(bmt.rank()), random.random() if bmt.rank() else None
    epochs = [[indices(batch) for batch in loader] for _ in range(2)]
    return {"epochs": epochs, "length": len(loader), "next": (torch.rand(3), random.random(), numpy.random.rand())}


def joined(results: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [
        [list(chain(*parts)) for parts in zip(*epoch, strict=True)]
        for epoch in zip(*(result["epochs"] for result in results), strict=True)
    ]


@pytest.mark.parametrize("make", LOADERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_the_shares_make_the_original_batches(make: Callable[[], DataLoader[Any]], world: int) -> None:
    original = two_epochs(make, share=False)
    results = run_ranks(world, two_epochs, make, True, disturb=True, default_device=False)  # samplers draw on the host
    assert joined(results) == original["epochs"]
    assert {result["length"] for result in results} == {original["length"]}
    for first, second in zip(results[0]["next"], original["next"], strict=True):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second)), (
            "rank 0's generators go on as without sharing"
        )
    sizes = [len(batch) for result in results for epoch in result["epochs"] for batch in epoch]
    assert max(sizes) - min(sizes) <= 2


def draws_of_the_model() -> dict[str, Any]:
    torch.manual_seed(100 + bmt.rank())
    own = torch.Generator().manual_seed(100 + bmt.rank())
    for _ in range(
        2 if bmt.rank() == 0 else 1
    ):  # every loader draws a seed for workers; rank 0's sampler one for the order
        torch.empty((), dtype=torch.int64).random_(generator=own)
    seen, same = [], []
    for batch in bmt.shard_loader(shuffled()):
        seen.append(indices(batch))
        same.append(torch.equal(torch.rand(bmt.rank() + 1), torch.rand(bmt.rank() + 1, generator=own)))
    return {"seen": seen, "same": same}


def test_other_ranks_keep_their_own_random_numbers() -> None:
    results = run_ranks(3, draws_of_the_model)
    assert sorted(index for result in results for batch in result["seen"] for index in batch) == list(range(23))
    assert [result["same"] for result in results] == [[True] * 4] * 3


def lazy_with_a_drawing_model() -> list[list[int]]:
    loader = bmt.shard_loader(drawing())
    seen = []
    for _ in range(2):
        for batch in loader:
            seen.append(indices(batch))
            torch.rand(5 + 3 * bmt.rank())
    return seen


def test_a_sampler_that_draws_between_the_models_draws() -> None:
    first, second = run_ranks(2, lazy_with_a_drawing_model)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    torch.empty((), dtype=torch.int64).random_()
    expected = list(Drawing())
    assert [a + b for a, b in zip(first, second, strict=True)][:4] == expected
    assert first[:4] != first[4:], "the second epoch must not repeat the first"


def few_samples() -> list[list[int]]:
    return [indices(batch) for batch in bmt.shard_loader(DataLoader(Numbers(7), batch_size=5))]


def test_fewer_samples_than_ranks_are_repeated() -> None:
    assert run_ranks(3, few_samples) == [[[0, 1], [5]], [[2, 3], [6]], [[4], [5]]]


def iterable() -> tuple[list[Any], list[Any], int]:
    loader: DataLoader[Any] = bmt.shard_loader(DataLoader(Stream(), batch_size=4))
    elements: DataLoader[Any] = bmt.shard_loader(DataLoader(Batches(), batch_size=None))
    return [batch.tolist() for batch in loader], list(elements), len(list(bmt.shard_loader(loader)))


def test_iterable_datasets() -> None:
    (first, first_elements, _), (second, second_elements, again) = run_ranks(2, iterable)
    assert [a + b for a, b in zip(first, second, strict=True)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert again == 3
    assert first_elements[1]["pair"].tokens.tolist() == [10, 11, 12]
    assert second_elements[1]["pair"] == Pair(second_elements[1]["pair"].tokens, ["n13", "n14"])
    assert second_elements[0]["scale"] == 2.0 and second_elements[1]["step"] == 10


def map_style_batches() -> list[list[int]]:
    dataset = torch.utils.data.TensorDataset(torch.arange(24).view(6, 4))
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None, shuffle=True)
    torch.manual_seed(bmt.rank())
    return [rows.tolist() for (rows,) in bmt.shard_loader(loader)]


def test_elements_that_are_batches_come_in_rank_0s_order() -> None:
    parts = [list(chain(*pair)) for pair in zip(*run_ranks(2, map_style_batches), strict=True)]
    assert sorted(parts) == torch.arange(24).view(6, 4).tolist()
    assert parts != sorted(parts)


class Crops(Dataset[torch.Tensor]):
    """Samples that draw random numbers from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, float(torch.rand(())), random.random(), numpy.random.rand()])


class CropsByList(Crops):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


def crops(dataset: type[Crops], share: bool, workers: int = 0, **options: Any) -> list[torch.Tensor]:
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    loader: DataLoader[torch.Tensor] = DataLoader(dataset(), 5, num_workers=workers, **options)
    loader = bmt.shard_loader(loader) if share else loader
    batches = []
    for batch in (batch for _ in range(2) for batch in loader):
        batches.append(batch)
        torch.rand(3)  # as a model does
    return batches


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dataset", [Crops, CropsByList])
def test_samples_that_draw_random_numbers_are_the_single_processs(dataset: type[Crops], shuffle: bool) -> None:
    original = crops(dataset, share=False, shuffle=shuffle)
    first, second = run_ranks(2, crops, dataset, True, shuffle=shuffle)
    for whole, *parts in zip(original, first, second, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def drawn_by_workers() -> list[torch.Tensor]:
    return crops(Crops, True, workers=1)


def test_workers_of_different_ranks_draw_different_numbers() -> None:
    original = crops(Crops, share=False, workers=1)
    first, second = run_ranks(2, drawn_by_workers)
    assert torch.equal(first[0], original[0][:3]), "rank 0's workers draw what they would draw alone"
    drawn = torch.cat([*first, *second])[:, 1:]
    assert len(drawn.unique(dim=0)) == len(drawn) == 24 and drawn.unique().numel() == 72


def attributes() -> dict[str, Any]:
    original: DataLoader[Any] = DataLoader(Numbers(10), batch_size=4, pin_memory=False, drop_last=True, num_workers=2)
    loader = bmt.shard_loader(original)
    twice = bmt.shard_loader(loader)
    kept = ("batch_size", "drop_last", "num_workers", "dataset", "collate_fn", "sampler")
    return {
        "same": all(getattr(loader, name) is getattr(original, name) for name in kept),
        "type": type(loader) is DataLoader and loader is not original,
        "through": loader.batch_sampler.batch_size,  # type: ignore[union-attr]
        "twice": twice is loader,
    }


def test_the_loader_keeps_its_attributes() -> None:
    assert run_ranks(2, attributes)[1] == {"same": True, "type": True, "through": 4, "twice": True}


def alone() -> bool:
    loader = shuffled()
    return bmt.shard_loader(loader) is loader


def test_one_rank_needs_nothing() -> None:
    assert run_ranks(1, alone) == [True]


def share_of_batches() -> list[Any]:
    torch.manual_seed(3)
    drawn = torch.randint(100, (6, 2))
    errors = []
    for length in (5, 1):
        with pytest.raises(ConfigurationError) as error:
            bmt.shard_batch(torch.zeros(length))
        errors.append(str(error.value))
    dataset = Numbers(4)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=0)
    with pytest.raises(ConfigurationError, match="DistributedSampler"):
        bmt.shard_loader(DataLoader(dataset, sampler=sampler))
    return [bmt.shard_batch(drawn), bmt.shard_batch(["a", "b", "c", "d"]), bmt.shard_batch((1, 2)), errors]


def test_shard_batch() -> None:
    first, second = run_ranks(2, share_of_batches)
    torch.manual_seed(3)
    assert torch.equal(torch.cat([first[0], second[0]]), torch.randint(100, (6, 2)))
    assert first[1:3] == [["a", "b"], (1,)] and second[1:3] == [["c", "d"], (2,)]
    assert "batch of 5" in first[3][0] and "2 ranks" in first[3][0] and "multiple of 2" in first[3][0]


X, Y = torch.arange(8.0).view(4, 2), torch.arange(4)


def shares_of_several() -> list[Any]:
    whole = {
        "pair": (X, Y),
        "alike": (X, X + 1),
        "list": [X, Y],
        "mapping": {"x": X, "y": Y, "names": ["a", "b", "c", "d"], "scale": 2.0, "none": None, "word": "all"},
        "nested": ({"x": X}, Y),
        "columns": (["a", "b"], [1, 2]),
        "samples": [(X[0], 0), (X[1], 1)],
        "targets": [{"box": X}, {"box": X}],
        "0-d": {"x": X, "t": torch.tensor(3)},
        "arrays": (X.cpu().numpy(), Y.cpu().numpy()),
        "arrays that are samples": (X[0].cpu().numpy(), X[1].cpu().numpy()),
        "beside an array": {"x": (X.cpu().numpy(), [1, 2, 3, 4])},
        "dataclass": Scaled(X, [1, 2, 3, 4]),
        "ordered": collections.OrderedDict(x=X, y=Y),
        "with a default": collections.defaultdict(list, x=X),
        "of the user": collections.UserDict(x=X),
        "read only": MappingProxyType({"x": X}),
    }
    return [{name: bmt.shard_batch(batch) for name, batch in whole.items()}]


@dataclasses.dataclass
class Scaled:
    x: torch.Tensor
    y: list[int]
    scale: float = 2.0


def refused() -> None:
    for batch in ([X, X], [X[0], X[1]], ((X[0], X[1]), Y[:2]), {"images": [X, X]}):
        with pytest.raises(ConfigurationError, match=r"samples, or several tensors.*shard_batch\(tuple\(batch\)\)"):
            bmt.shard_batch(batch)
    for batch in ((X, Y[:2]), {"x": X, "classes": ["cat", "dog"]}):
        with pytest.raises(ConfigurationError, match="parts of 2 and 4 rows"):
            bmt.shard_batch(batch)
    for batch in (torch.tensor(1.0), {}, {"scale": 2.0}, "text"):
        with pytest.raises(ConfigurationError, match="nothing that has rows"):
            bmt.shard_batch(batch)
    for batch in ((X[:3], Y[:3]), {"x": X[:3]}):
        with pytest.raises(ConfigurationError, match="batch of 3 cannot be split evenly"):
            bmt.shard_batch(batch)
    other: Any
    for other in (X.to_sparse(), {1, 2}, collections.deque([X, Y]), (X, {3, 4, 5, 6}), {"x": X, "y": X.to_sparse()}):
        with pytest.raises(ConfigurationError, match="rows cannot be taken"):
            bmt.shard_batch(other)
    with torch.device("cpu"):  # where torch wants the lengths
        packed = torch.nn.utils.rnn.pack_sequence([X, X[:2]])
    for other in (packed, (packed, Y[:2]), {"x": packed}):
        with pytest.raises(ConfigurationError, match="PackedSequence"):
            bmt.shard_batch(other)


def test_what_belongs_together_is_cut_together() -> None:
    run_ranks(2, refused)
    (first,), (second,) = run_ranks(2, shares_of_several)
    for name in ("pair", "alike", "list"):
        assert type(first[name]) is (list if name == "list" else tuple)
        assert torch.equal(first[name][0], X[:2]) and torch.equal(second[name][0], X[2:])
    assert torch.equal(second["pair"][1], Y[2:]) and torch.equal(second["alike"][1], X[2:] + 1)
    assert torch.equal(second["mapping"]["x"], X[2:]) and second["mapping"]["names"] == ["c", "d"]
    assert (second["mapping"]["scale"], second["mapping"]["none"], second["mapping"]["word"]) == (2.0, None, "all")
    assert torch.equal(second["nested"][0]["x"], X[2:]) and torch.equal(second["nested"][1], Y[2:])
    assert (first["columns"], second["columns"]) == ((["a"], [1]), (["b"], [2]))
    assert [sample[1] for sample in first["samples"] + second["samples"]] == [0, 1]
    assert len(first["targets"]) == 1 and torch.equal(first["targets"][0]["box"], X)
    assert torch.equal(first["0-d"]["t"], torch.tensor(3)) and torch.equal(second["0-d"]["x"], X[2:])
    assert [second["arrays"][0].tolist(), second["arrays"][1].tolist()] == [X[2:].tolist(), [2, 3]]
    assert [part["arrays that are samples"][0].tolist() for part in (first, second)] == X[:2].tolist()
    assert second["beside an array"]["x"][0].tolist() == X[2:].tolist() and second["beside an array"]["x"][1] == [3, 4]
    assert second["dataclass"].y == [3, 4] and second["dataclass"].scale == 2 and second["dataclass"].x.shape == (2, 2)
    kinds = {"ordered": collections.OrderedDict, "with a default": collections.defaultdict}
    for name, kind in {**kinds, "of the user": collections.UserDict, "read only": dict}.items():
        assert type(second[name]) is kind and torch.equal(second[name]["x"], X[2:]), name
    assert second["with a default"]["new"] == []


class Tokens:
    """A batch that moves itself."""

    def to(self, device: torch.device) -> tuple[str, torch.device]:
        return "moved", device


def moved() -> Any:
    x = torch.arange(3)
    batch = {"x": x, "pair": (x, [x, "text"]), "named": FirstAndSecond(x, None), "tokens": Tokens(), "n": 5}
    on_device = bmt.to_device(batch)
    assert on_device["tokens"] == ("moved", on_device["x"].device)
    return on_device, bmt.to_device("text"), bmt.to_device((x,))


class FirstAndSecond(NamedTuple):
    first: torch.Tensor
    second: object


def test_to_device() -> None:
    ((batch, text, (only,)),) = run_ranks(1, moved)
    assert list(batch) == ["x", "pair", "named", "tokens", "n"] and batch["n"] == 5 and text == "text"
    assert batch["pair"][1][1] == "text"
    assert isinstance(batch["named"], FirstAndSecond) and batch["named"].second is None
    for tensor in (batch["x"], batch["pair"][0], batch["pair"][1][0], batch["named"].first, only):
        assert tensor.tolist() == [0, 1, 2] and tensor.device == batch["x"].device


def rest(kind: str, skip: int) -> tuple[list[Any], int, int, list[Any]]:
    """What is left of a second epoch, its length, what is drawn behind it, and the samples that were loaded."""
    torch.manual_seed(3)
    loader: DataLoader[Any] = {
        "shuffled": lambda: shuffled(),
        "own generator": with_generator,
        "drawn batches": lambda: DataLoader(Seen(100), batch_sampler=Drawing()),  # type: ignore[arg-type]
        "workers": lambda: shuffled(num_workers=1),
    }[kind]()
    shared = bmt.shard_loader(loader)
    list(shared)
    Seen.loaded.clear()
    left = bmt.skip_batches(shared, skip)
    batches = [tokens[:, 0].tolist() for tokens, _ in left]
    return batches, len(left), int(torch.randint(1000, ())), list(Seen.loaded)


class Seen(Numbers):
    loaded: list[int] = []  # noqa: RUF012 - looked at within one process

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        self.loaded.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "drawn batches", "workers"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rest_of_an_epoch(kind: str, ranks: int) -> None:
    whole, *_ = run_ranks(1, rest, kind, 0)[0]
    found = run_ranks(ranks, rest, kind, 2)
    for number, batch in enumerate(whole[2:]):
        assert list(chain.from_iterable(batches[number] for batches, *_ in found)) == batch
    assert {length for _, length, *_ in found} == {len(whole) - 2}
    if kind == "drawn batches" and ranks == 1:
        assert found[0][3] == list(chain.from_iterable(whole[2:]))  # no other sample was loaded


def look() -> tuple[list[list[int]], list[list[int]], int]:
    plain, stream = shuffled(), DataLoader(Stream(), batch_size=4)
    left = bmt.skip_batches(bmt.skip_batches(plain, 1), 2)
    assert len(list(plain)) == 4 and len(list(left)) == 1 and len(bmt.skip_batches(plain, 9)) == 0
    shared = bmt.skip_batches(bmt.shard_loader(stream), 1)
    return [b.tolist() for b in bmt.skip_batches(stream, 1)], [b.tolist() for b in shared], len(left)


def test_the_rest_of_an_epoch_of_what_is_not_shared_out_or_read_in_a_row() -> None:
    one, two = run_ranks(2, look)
    assert one[0] == two[0] == [[4, 5, 6, 7], [8, 9, 10]] and one[2] == 1
    assert [a + b for a, b in zip(one[1], two[1], strict=True)] == one[0]


def test_batches_of_a_loader_without_batches_are_not_left_out() -> None:
    with pytest.raises(ConfigurationError, match="islice"):
        bmt.skip_batches(DataLoader(Numbers(4), batch_size=None), 1)
