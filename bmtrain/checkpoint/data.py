"""Where training is in its data, so that another run goes on with the sample that comes next."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ..rng import capture, restore


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
        self._start: Any = None
        self._skip = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        now = capture()
        if skip:
            restore(self._start)
        else:
            self._start, self.batches = now, 0
        batches = _after(self._loader, skip)
        if skip:
            restore(now)
        for batch in batches:
            self.batches += 1
            self.total += 1
            yield batch
        self.epoch, self.batches = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches, and the generators as the epoch began."""
        return {"epoch": self.epoch, "batches": self.batches, "total": self.total, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next epoch begin there."""
        self.epoch, self.batches, self.total = state["epoch"], state["batches"], state["total"]
        self._start, self._skip = state["start"], state["batches"]


def _after(loader: DataLoader[Any], skip: int) -> Iterator[Any]:
    """The batches after the first ``skip`` ones, whose order is drawn now."""
    if not skip:
        return iter(loader)
    if loader.batch_sampler is None:
        return itertools.islice(iter(loader), skip, None)
    sampler = loader.batch_sampler
    # DataLoader forbids plain assignment because running workers would not notice; these are started here.
    object.__setattr__(loader, "batch_sampler", _Later(sampler, skip))
    try:
        return iter(loader)
    finally:
        object.__setattr__(loader, "batch_sampler", sampler)


class _Later:
    """A batch sampler that leaves out its first batches, once: workers that stay go through it again."""

    def __init__(self, sampler: Any, skip: int) -> None:
        self._sampler, self._skip = sampler, skip

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        return itertools.islice(iter(self._sampler), skip, None)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)
