"""How processes find each other: torchrun's environment, or one process alone."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlparse

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import CommunicationError

_PAUSE = 0.01  # seconds between two looks at the store


@dataclass(frozen=True)
class Meeting:
    """What a rank knows once all ranks have met."""

    rank: int
    world_size: int
    store: Store
    host: str | None = None
    """The host at which they met; None for one rank, and where they met in a file."""


def meet(init_method: str, rank: int, world_size: int, timeout: timedelta) -> Meeting:
    """Meet the other ranks through ``init_method`` (``env://``, ``tcp://HOST:PORT`` or ``file://PATH``)."""
    if world_size == 1:
        return Meeting(0, 1, PrefixStore("bmtrain", HashStore()))
    try:
        store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        ours = PrefixStore("bmtrain", store)
        name = _name_of_attempt(ours, rank, world_size, timeout)
    except (RuntimeError, ValueError) as error:
        raise CommunicationError(
            f"The {world_size} ranks could not meet through {init_method!r}: {error}. "
            "Check that MASTER_ADDR and MASTER_PORT are the same everywhere and reachable from every node."
        ) from error
    return Meeting(rank, world_size, PrefixStore(name, ours), _host(init_method))


def _host(init_method: str) -> str | None:
    if init_method.startswith("env://"):
        return os.environ.get("MASTER_ADDR")
    return urlparse(init_method).hostname


def _name_of_attempt(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that these ranks agree on, and no ranks before them had.

    A launcher that starts ranks again may keep the store, and with it the addresses of ranks that died.  Its count of
    restarts does not help: agents of several nodes count apart.  So every rank comes with a word of its own, rank 0
    answers to that word, and goes on answering until all have heard it, as the first words it finds may be old.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"word/{rank}", word)
        name: str = store.get(f"name for/{word}").decode()
        store.add(f"{name}/heard", 1)
        return name
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    answered: set[str] = set()
    while store.add(f"{name}/heard", 0) < world_size - 1:
        here = [other for other in range(1, world_size) if store.check([f"word/{other}"])]
        for word in {store.get(f"word/{other}").decode() for other in here} - answered:
            store.set(f"name for/{word}", name)
            answered.add(word)
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {timeout} rank 0 had heard of {len(here)} other ranks only: {here}")
        time.sleep(_PAUSE)
    return name
