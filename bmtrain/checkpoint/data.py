"""Where training is in its data, so that another run goes on with the sample that comes next."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..rng import capture, generators_of, restore


class ResumableLoader:
    """A DataLoader, or what ``bmt.shard_loader`` made of it, that knows how many batches of an epoch were used.

    Go through it as through the loader.  After a resume the first epoch begins where the saved one was, in the same
    order, at any number of ranks; batches before that are not loaded, except those of an iterable dataset.  The order
    has to follow from the generators as they are when an epoch begins, as with ``shuffle=True``.

    Attributes:
        epoch: the present one, from 0; ``range(loader.epoch, epochs)`` is what is left.
        batches: how many of its batches were handed out.
        total: how many batches all epochs have handed out.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self.epoch = self.batches = self.total = 0
        self._is_stream = isinstance(loader.dataset, IterableDataset)
        self._kind = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._order = _Order(getattr(loader, self._kind), generators_of(loader))

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        if not self._order.skip:
            self.batches = 0
        for batch in self._after(self._order.skip) if self._is_stream else self._ordered():
            self.batches += 1
            self.total += 1
            yield batch
        self.epoch, self.batches = self.epoch + 1, 0

    def _ordered(self) -> Iterator[Any]:
        """The loader's batches, whose indices come through ``_order``."""
        sampler, again, now = getattr(self._loader, self._kind), self._order.skip > 0, capture()
        # DataLoader forbids plain assignment because running workers would not notice: they have the same one already.
        object.__setattr__(self._loader, self._kind, self._order)
        try:
            return iter(self._loader)
        finally:
            object.__setattr__(self._loader, self._kind, sampler)
            if again:
                restore(now)  # the loader draws a seed, which it drew already

    def _after(self, skip: int) -> Iterator[Any]:
        """The batches of an iterable dataset after the first ``skip`` ones, which are read."""
        with self._order.begins():
            batches = iter(self._loader)
            for _ in range(skip):
                next(batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches, and the generators as the order of the epoch was drawn."""
        return {"epoch": self.epoch, "batches": self.batches, "total": self.total, "start": self._order.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next epoch begin there."""
        self.epoch, self.batches, self.total = state["epoch"], state["batches"], state["total"]
        self._order.start, self._order.skip = state["start"], state["batches"]


class _Order:
    """A sampler that knows from which generators its order was drawn, and can leave out what comes first, once.

    Attributes:
        skip: how much to leave out the next time.
        start: the process's generators, and the loader's own, when an order was drawn; then the one to draw from.
    """

    def __init__(self, sampler: Any, generators: list[torch.Generator]) -> None:
        self._sampler, self._generators = sampler, generators
        self.skip = 0
        self.start: Any = None

    @contextmanager
    def begins(self) -> Iterator[None]:
        """An order is drawn inside; where one is drawn again, the process's generators stay where they are."""
        again, self.skip = self.skip > 0, 0
        now = capture()
        if not again:
            self.start = now, [generator.get_state() for generator in self._generators]
            yield
            return
        restore(self.start[0])
        for generator, state in zip(self._generators, self.start[1], strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            restore(now)

    def __iter__(self) -> Iterator[Any]:
        skip, drawn = self.skip, iter(self._sampler)
        with self.begins():
            first = list(itertools.islice(drawn, skip + 1))[skip:]
        yield from first
        yield from drawn

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)
