"""Each rank's share of the global batches.

A converted script keeps the original's batch size.  Of every global batch each rank takes its part, so that one step
over all ranks sees exactly what one step of the original sees.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import GeneratorType
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from .context import context
from .errors import ConfigurationError
from .log import warn
from .rng import Draws, capture, generators_of, restore, same
from .topology import share

T = TypeVar("T")
BatchT = TypeVar("BatchT", bound=Tensor | Sequence[Any] | Mapping[Any, Any])
LoaderT = TypeVar("LoaderT", bound=DataLoader[Any])
_DEEP = 4
_ITERATORS: tuple[type, ...] = (
    enumerate, zip, map, filter, itertools.islice, itertools.chain, itertools.cycle, type(iter([])), type(iter(())),
)  # fmt: skip


def shard_batch(batch: BatchT) -> BatchT:
    """This rank's part of a global batch that every rank holds alike.

    ``batch`` is a tensor (cut along dimension 0, the result is a view), a sequence of samples, or several of these that
    belong together, each cut: in a tuple, a mapping, a dataclass, or a list whose tensors differ in dtype or number of
    dimensions.  Arrays of numpy in a tuple are cut so where they differ in these, and are samples where they do not.
    Every rank calls this equally often: a rank that takes a batch more is found out at the next collective.

    Raises ConfigurationError when the length is not a multiple of the number of ranks, as parts of different length
    would weigh their samples differently, when a list of tensors could be either, and where rows cannot be taken.
    """
    context().diary.takes_batch()
    lengths: set[int] = set()
    _refuse_packed(batch)
    if isinstance(batch, tuple) and any(isinstance(entry, Tensor) for entry in batch):
        cut = _with_entries(batch, [_cut(entry, lengths) for entry in batch])
    else:
        cut = _cut(batch, lengths)
    if len(lengths) != 1:
        parts = f"parts of {' and '.join(map(str, sorted(lengths)))} rows" if lengths else "nothing that has rows"
        raise ConfigurationError(
            f"A batch holds {parts}, so that it is not clear which are its samples. Call bmt.shard_batch with what "
            "belongs to the samples alone."
        )
    return cut  # type: ignore[no-any-return]


def _cut(value: Any, lengths: set[int]) -> Any:
    """The same for what is in a batch, noting its length; what has no length is for all ranks."""
    if isinstance(value, Mapping):
        return _with_items(value, {key: _cut(entry, lengths) for key, entry in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _cut(entry, lengths) for name, entry in own.items()})
    _refuse_packed(value)
    if isinstance(value, list | tuple):
        tensors = [entry for entry in value if isinstance(entry, Tensor)]
        kinds = {(entry.dtype, entry.dim()) if isinstance(entry, Tensor) else type(entry) for entry in value}
        if tensors and len(kinds) == 1:
            raise ConfigurationError(
                f"A {type(value).__name__} of {len(value)} tensors may be {len(value)} samples, or several tensors "
                "whose rows are the samples. bmt.shard_batch(tuple(batch)) cuts the rows of each; for samples, cut "
                "their numbers: [batch[i] for i in bmt.shard_batch(range(len(batch)))]."
            )
        of_columns = isinstance(value, tuple) and any(map(_is_column, value))
        of_columns &= not all(map(_is_array, value)) or len({(a.dtype, a.ndim) for a in value}) > 1
        if tensors or of_columns:
            return _with_entries(value, [_cut(entry, lengths) for entry in value])
    if not hasattr(value, "__len__") or isinstance(value, str) or (isinstance(value, Tensor) and not value.dim()):
        return value
    topology = context().topology
    length = len(value)
    lengths.add(length)
    if length % topology.data_size:
        raise ConfigurationError(
            f"A batch of {length} cannot be split evenly over {topology.data_size} ranks. "
            f"Use a batch size that is a multiple of {topology.data_size}."
        )
    part = share(length, topology.data_size, topology.data_rank)
    try:
        return value[part.start : part.stop]
    except (TypeError, RuntimeError):  # as a layout of torch's has no such operation
        kind = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigurationError(
            f"A batch holds a {kind}, whose rows cannot be taken. Call bmt.shard_batch before it is made, or with what "
            "else belongs to the samples."
        ) from None


def _is_array(value: object) -> bool:
    """One of numpy's, or of what is like it; no tensor."""
    return not isinstance(value, Tensor) and hasattr(value, "dtype") and bool(getattr(value, "ndim", 0))


def _is_column(value: object) -> bool:
    return isinstance(value, list | tuple) or _is_array(value)


def _refuse_packed(value: object) -> None:
    """Raises ConfigurationError for a PackedSequence."""
    if isinstance(value, PackedSequence):
        raise ConfigurationError(
            "A PackedSequence lies time step by time step, so that its rows are no samples. Cut the padded tensor and "
            "the lengths, and pack each rank's part."
        )


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping like ``value`` with other values; a dict if none can be made."""
    if type(value) is dict:
        return items
    try:
        made: Any = copy.copy(value)
        for key, entry in items.items():
            made[key] = entry
    except TypeError:
        return items
    return made


def _with_entries(value: list[Any] | tuple[Any, ...], entries: list[Any]) -> Any:
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def shard_loader(loader: LoaderT) -> LoaderT:
    """A loader that gives this rank its part of each batch that ``loader`` would give to a single process.

    Dataset, workers, ``collate_fn``, pinning and all else are ``loader``'s.  Every rank must go through it equally
    often.

    *Order.*  Each epoch follows rank 0: where the sampler draws random numbers, it draws on every rank what it would
    draw on rank 0 (from torch's CPU generator, ``random``, numpy, or a generator given to the loader).  The random
    numbers that the model draws are left alone.

    *Random datasets.*  Where samples draw random numbers (crops, random positions in a text), ranks must not draw the
    same ones for different samples.  Without workers, every rank then loads whole batches and keeps its part, so that
    the samples are the single process's.  With workers, which are there because loading is slow, each rank's workers
    draw numbers of their own.  A generator that the dataset itself holds has to be seeded by ``bmt.rank()``.

    *Short batches.*  A batch that does not divide evenly, usually the last, is split as evenly as possible, the first
    ranks getting one sample more, and a warning says so once.  The mean over ranks of each rank's mean then weighs
    samples slightly differently from the single process, unless the loss is ``bmt.mean(losses)`` or
    FusedCrossEntropy; ``drop_last=True`` leaves the batch out.  A batch with fewer samples than ranks is repeated until
    every rank has one.

    *Iterable datasets* are read whole by every rank, which keeps its part of each batch; they must yield the same
    samples on every rank.  With ``batch_size=None`` each element counts as a batch, and its tensors are cut along
    dimension 0.

    Raises ConfigurationError for a loader with a DistributedSampler, which would split the data twice.
    """
    topology = context().topology
    if isinstance(loader.sampler, DistributedSampler):
        raise ConfigurationError(
            "This DataLoader has a DistributedSampler, which splits the data already. "
            "Build it as for a single process (shuffle=True or an ordinary sampler) and give it to bmt.shard_loader()."
        )
    if topology.data_size == 1 or isinstance(loader.batch_sampler, ShardedBatchSampler):
        return loader
    sharded = copy.copy(loader)
    replaced: dict[str, Any] = {"_iterator": None}
    iterable = isinstance(loader.dataset, IterableDataset)
    if loader.batch_sampler is None:
        replaced["collate_fn"] = _ShareOfElement(loader.collate_fn, topology.data_rank, topology.data_size)
        if not iterable:
            replaced["sampler"] = AlignedSampler(loader.sampler, generators_of(loader))
    elif iterable:
        replaced["collate_fn"] = _ShareOfSamples(loader.collate_fn, topology.data_rank, topology.data_size)
    else:
        replaced["batch_sampler"] = ShardedBatchSampler(loader.batch_sampler, generators_of(loader))
        replaced["_get_iterator"] = partial(_iterator, sharded, topology.data_rank)
    for name, value in replaced.items():
        # DataLoader forbids plain assignment because running workers would not notice; the copy has none yet.
        object.__setattr__(sharded, name, value)
    return sharded


def skip_batches(loader: LoaderT, count: int) -> LoaderT:
    """``loader`` without its first ``count`` batches, which are not loaded: the rest of an epoch that is resumed.

    The order is drawn as for all of them.  ``loader`` may be one of ``shard_loader``, and stays as it is; ``len()`` of
    the result is that of what is left.  An iterable dataset is read from its start.

    Raises ConfigurationError where ``loader`` has no batches of its own (``batch_size=None``).
    """
    if loader.batch_sampler is None:
        raise ConfigurationError(
            "bmt.skip_batches() leaves out batches, and this DataLoader has none (batch_size=None): go through "
            f"itertools.islice(loader, {count}, None), which loads what it leaves out."
        )
    rest = copy.copy(loader)
    object.__setattr__(rest, "_iterator", None)
    sampler: Any = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        object.__setattr__(rest, "_get_iterator", lambda: itertools.islice(loader._get_iterator(), count, None))
    elif isinstance(sampler, ShardedBatchSampler):
        left = ShardedBatchSampler(_Rest(sampler.sampler, count), sampler.generators)
        object.__setattr__(rest, "batch_sampler", left)
        object.__setattr__(rest, "_get_iterator", partial(_iterator, rest, context().topology.data_rank))
    else:
        object.__setattr__(rest, "batch_sampler", _Rest(sampler, count))
    return rest


class _Rest(Sampler[Any]):
    """What a sampler yields after its first ``count`` items.  Attributes not found here are the sampler's."""

    def __init__(self, sampler: Any, count: int) -> None:
        self.sampler, self._count = sampler, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.sampler, self._count, None)

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self._count)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self.sampler, name)


def is_sharded(loader: object) -> bool:
    """Whether a loader, or what wraps one (a progress bar, a prefetcher), gives each rank its share of each batch."""
    return _shares(loader, 0)


def _shares(loader: object, deep: int) -> bool:
    sampler: object = None
    collate: object = None
    if isinstance(loader, DataLoader):
        sampler, collate = loader.batch_sampler, loader.collate_fn
    else:  # one that has been started
        sampler, collate = getattr(loader, "_index_sampler", None), getattr(loader, "_collate_fn", None)
    if sampler is not None or collate is not None:
        return isinstance(sampler, ShardedBatchSampler) or isinstance(collate, _ShareOfElement | _ShareOfSamples)
    if deep >= _DEEP:
        return False
    inner = (getattr(loader, name, None) for name in ("iterable", "loader", "dataloader", "data_loader", "_loader"))
    named = next((found for found in inner if found is not None), None)
    return _shares(named, deep + 1) if named is not None else any(_shares(one, deep + 1) for one in _within(loader))


def _within(loader: object) -> list[object]:
    """What an object of a script's own, or an iterator of Python's, may go through."""
    if isinstance(loader, GeneratorType):
        held = list(loader.gi_frame.f_locals.values()) if loader.gi_frame is not None else []
    elif isinstance(loader, _ITERATORS):
        held = gc.get_referents(loader)
    elif isinstance(loader, list | tuple):
        held = list(loader[:_DEEP])
    elif isinstance(loader, torch.Tensor | torch.nn.Module | Dataset):
        held = []
    else:
        held = list(getattr(loader, "__dict__", {}).values())
    return [one for one in held if hasattr(one, "__iter__") and not isinstance(one, str | bytes | dict | torch.Tensor)]


def to_device(batch: T) -> T:
    """``batch`` with its tensors on this rank's device, in dicts, lists and tuples, too.

    What else has a method ``to``, such as a batch of transformers' tokenizers, is moved by it; other values stay.
    """
    device = context().device.torch_device
    if hasattr(batch, "to"):
        return batch.to(device)  # type: ignore[no-any-return]
    if isinstance(batch, Mapping):
        return _with_items(batch, {key: to_device(entry) for key, entry in batch.items()})  # type: ignore[no-any-return]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(entry) for entry in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(entry) for entry in batch)
    return batch


def _iterator(loader: DataLoader[Any], rank: int) -> Any:
    """What ``iter(loader)`` goes through: the loader's own iterator, over a dataset that minds its random numbers."""
    inner = copy.copy(loader)
    if loader.num_workers == 0:
        object.__setattr__(inner, "dataset", _WholeBatches(loader.dataset))
    else:
        object.__setattr__(inner, "worker_init_fn", _WorkerStart(loader.worker_init_fn, rank))
    return type(inner)._get_iterator(inner)


class AlignedSampler(Sampler[Any]):
    """What ``sampler`` yields on rank 0, on every rank.

    Made on every rank in the same order.  Attributes not found here are ``sampler``'s, so that ``set_epoch`` and the
    like work.
    """

    def __init__(self, sampler: Any, generators: Sequence[Generator] = ()) -> None:
        here = context()
        self.sampler = sampler
        self.generators = generators
        here.samplers += 1
        self._number = here.samplers
        self._epoch = 0
        self._warned = False

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for item, _ in self.drawn():
            yield item

    def drawn(self) -> Iterator[tuple[Any, Draws]]:
        """Each item, and the epoch's draws, for what else the single process would draw there."""
        self._epoch += 1
        draws = Draws(context(), f"{self._number}/{self._epoch}", self.generators)
        drawn = draws.run(lambda: iter(self.sampler))
        end = object()
        diary = context().diary
        while (item := draws.run(lambda: next(drawn, end))) is not end:
            diary.takes_batch()
            yield item, draws

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self.sampler, name)


class ShardedBatchSampler(AlignedSampler):
    """This rank's part of each batch that ``sampler``, a batch sampler, yields on rank 0."""

    def __iter__(self) -> Iterator[Any]:
        topology = context().topology
        for batch, draws in self.drawn():
            bounds = _bounds(len(batch), topology.data_rank, topology.data_size)
            if len(batch) % topology.data_size and not self._warned:
                self._warned = True
                _warn_of_uneven(len(batch), topology.data_size)
            yield _Share(batch, bounds, draws) if type(batch) is list else batch[bounds]


def _warn_of_uneven(length: int, ranks: int) -> None:
    # a rank is never left without a sample (``_bounds``), so the ranks of a smaller batch have some of them in common
    twice = " Its samples are on several ranks, and stand as often in what is collected." if length < ranks else ""
    if context().rank == 0:
        warn(
            f"A batch of {length} does not divide evenly over {ranks} ranks. A mean over each rank's samples, averaged "
            "over ranks, weighs them slightly differently from one process. For exactly the same, compute the loss by "
            'bmt.mean(losses) from a loss with reduction="none" (or by bmt.loss.FusedCrossEntropy), or leave such '
            "batches out with drop_last=True." + twice,
            stacklevel=2,
        )


class _Share(list[Any]):
    """A rank's part of a batch of indices, which knows the batch.  In another process it is a plain list."""

    def __init__(self, batch: list[Any], bounds: slice, draws: Draws) -> None:
        super().__init__(batch[bounds])
        self.batch, self.bounds, self.draws = batch, bounds, draws

    def __reduce__(self) -> Any:
        return list, (list(self),)


class _WholeBatches:
    """A dataset that turns out to draw random numbers is read in whole batches, as by a single process."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._random = False

    def __getitems__(self, indices: Any) -> Any:
        if not isinstance(indices, _Share):
            return self._samples(indices)
        if not self._random:
            before = capture()
            samples = self._samples(list(indices))
            if same(capture(), before):
                return samples
            self._random = True
            restore(before)
        if indices.draws.together:
            return self._samples(indices.batch)[indices.bounds]
        return indices.draws.run(lambda: self._samples(indices.batch))[indices.bounds]

    def _samples(self, indices: Any) -> Any:
        if getattr(self._dataset, "__getitems__", None):
            return self._dataset.__getitems__(indices)
        return [self._dataset[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


class _WorkerStart:
    """A ``worker_init_fn`` that makes the workers of other ranks draw other random numbers than rank 0's."""

    def __init__(self, then: Callable[[int], None] | None, rank: int) -> None:
        self._then, self._rank = then, rank

    def __call__(self, worker: int) -> None:
        if self._rank:
            seed = (torch.initial_seed() + self._rank * 0x9E3779B97F4A7C15) % 2**63
            torch.manual_seed(seed)
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed % 2**32)
        if self._then is not None:
            self._then(worker)


class _ShareOfSamples:
    """A ``collate_fn`` that sees this rank's samples only."""

    def __init__(self, collate: Callable[[Any], Any], rank: int, ranks: int) -> None:
        self._collate, self._rank, self._ranks = collate, rank, ranks

    def __call__(self, samples: Any) -> Any:
        return self._collate(_part(samples, self._rank, self._ranks))


class _ShareOfElement:
    """A ``collate_fn`` that keeps this rank's rows of an element that is a batch itself."""

    def __init__(self, convert: Callable[[Any], Any], rank: int, ranks: int) -> None:
        self._convert, self._rank, self._ranks = convert, rank, ranks

    def __call__(self, element: Any) -> Any:
        return self._rows(self._convert(element))

    def _rows(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.dim() == 0 else _part(value, self._rank, self._ranks)
        if isinstance(value, Mapping):
            return _with_items(value, {key: self._rows(entry) for key, entry in value.items()})
        _refuse_packed(value)
        if isinstance(value, list | tuple):
            if hasattr(value, "_fields") or any(isinstance(entry, Tensor | Mapping | list | tuple) for entry in value):
                return _with_entries(value, [self._rows(entry) for entry in value])
            return _part(value, self._rank, self._ranks)  # a column of plain values, such as strings
        return value


def _part(batch: Any, rank: int, ranks: int) -> Any:
    return batch[_bounds(len(batch), rank, ranks)]


def _bounds(length: int, rank: int, ranks: int) -> slice:
    """Part ``rank`` of ``ranks``: as even as possible, and never empty unless the batch is."""
    if 0 < length < ranks:
        first = rank % length
        return slice(first, first + 1)
    part = share(length, ranks, rank)
    return slice(part.start, part.stop)
