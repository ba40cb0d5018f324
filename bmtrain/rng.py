"""Random numbers that are the same on every rank, drawn without disturbing the rank's own."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader

from .context import Context
from .errors import CommunicationError
from .wire import from_bytes, to_bytes

T = TypeVar("T")
State = list[object]
"""Of torch's CPU generator, of random, and of numpy if it is in use; plain values, which files and other ranks take."""


class Draws:
    """One stretch of draws, such as an epoch's order: made by every rank from rank 0's generators as they are now.

    On rank 0, and on ranks whose generators stand where rank 0's do (``together``), they advance as if nothing had been
    added.  On the others they are put back after every draw, except ``generators``, the ones made for this purpose,
    which simply follow rank 0's.  ``key`` names the stretch, alike on all ranks and only once.
    """

    def __init__(self, here: Context, key: str, generators: Sequence[torch.Generator] = ()) -> None:
        own = [generator.get_state() for generator in generators]
        self._state, leading = _from_rank_0(here, key, (capture(), own))
        self.together = here.rank == 0 or same(capture(), self._state)
        for generator, state in zip(generators, leading, strict=True):
            generator.set_state(state)

    def run(self, draw: Callable[[], T]) -> T:
        """``draw()``, with the generators where the previous draw left them."""
        own = capture()
        restore(self._state)
        try:
            return draw()
        finally:
            drawn = capture()
            # A sampler may draw again after the model has drawn.  Generators that follow then jump to the sampler's, so
            # that a number drawn once for the order is not drawn again for the next epoch's.
            follow = self.together and not same(drawn, self._state)
            restore(drawn if follow else own)
            self._state = drawn


def capture() -> State:
    """The state of the process's generators."""
    state: State = [torch.get_rng_state(), random.getstate()]
    numpy = sys.modules.get("numpy")
    return state if numpy is None else [*state, numpy.random.get_state()]


def restore(state: State) -> None:
    """Put the process's generators back."""
    of_torch, of_random, *of_numpy = cast(list[Any], state)
    torch.set_rng_state(of_torch)
    random.setstate(of_random)
    if of_numpy:
        import numpy

        numpy.random.set_state(*of_numpy)


def same(one: State, other: State) -> bool:
    """Whether nothing was drawn between two captures."""
    return _comparable(one) == _comparable(other)


def _comparable(state: State) -> list[object]:
    """The same in words that compare to one truth value, as tensors and arrays do not."""
    of_torch, of_random, *of_numpy = cast(list[Any], state)
    return [of_torch.numpy().tobytes(), of_random, *((kind[1].tobytes(), *kind[2:]) for kind in of_numpy)]


def generators_of(loader: DataLoader[object]) -> list[torch.Generator]:
    """The generators that were given to a DataLoader or its samplers, each once."""
    holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _from_rank_0(here: Context, key: str, value: Any) -> Any:
    """Rank 0's ``value`` on every rank.

    Through the store, not by a collective: a loader may be read by a thread, where a collective could meet another one.
    """
    if here.world_size == 1:
        return value
    key = f"draws/{key}"
    if here.rank == 0:
        here.store.set(key, to_bytes(value).hex())
        return value
    try:
        sent = _wait_for(here, key).decode()
    except CommunicationError:
        raise
    except RuntimeError as error:
        raise CommunicationError(
            f"Rank {here.rank} waited for rank 0 to begin the same epoch, which it did not: {error}. "
            "Every rank must go through the same sharded loaders in the same order."
        ) from error
    received = from_bytes(bytes.fromhex(sent))
    if here.store.add(f"{key}/read", 1) == here.world_size - 1:
        here.store.delete_key(key)
        here.store.delete_key(f"{key}/read")
    return received


def _wait_for(here: Context, key: str) -> bytes:
    """What rank 0 puts there.  Raises RuntimeError after the context's timeout, CommunicationError if it never will."""
    deadline, pause = time.monotonic() + here.timeout.total_seconds(), 0.0
    is_watched = threading.get_ident() == here.diary.thread
    if is_watched:
        here.diary.enter_pair("the wait for the order of batches from", 0)
    try:
        while not here.store.check([key]):
            if here.watchdog is not None and here.watchdog.verdict is not None:
                raise CommunicationError(here.watchdog.verdict.text)
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out after {here.timeout}")
            time.sleep(pause)
            pause = min(pause + 0.001, 0.05)
        return here.store.get(key)
    finally:
        if is_watched:
            here.diary.leave()
