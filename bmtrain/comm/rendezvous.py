"""How processes find each other: torchrun's environment, or one process alone."""

from __future__ import annotations

import hmac
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlparse

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import CommunicationError

_PAUSE = 0.01  # seconds between two looks at the store
_FAREWELL = timedelta(seconds=2)


@dataclass(frozen=True)
class Meeting:
    """What a rank knows once all ranks have met."""

    rank: int
    world_size: int
    store: Store
    secret: str = ""
    """What the ranks of this attempt alone can know, if they were given a token."""
    host: str | None = None
    """The host at which they met; None for one rank, and where they met in a file."""


def meet(init_method: str, rank: int, world_size: int, timeout: timedelta, token: str = "") -> Meeting:
    """Meet the other ranks through ``init_method`` (``env://``, ``tcp://HOST:PORT`` or ``file://PATH``).

    Only ranks that were given the same ``token`` meet, which is never sent: each shows that it knows it.

    Raises CommunicationError, at once where a token differs.
    """
    if world_size == 1:
        return Meeting(0, 1, PrefixStore("bmtrain", HashStore()))
    try:
        store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        ours = PrefixStore("bmtrain", store)
        secret = signed(token, _name_of_attempt(ours, rank, world_size, timeout, token))
    except (RuntimeError, ValueError) as error:
        raise CommunicationError(
            f"The {world_size} ranks could not meet through {init_method!r}: {error}. "
            "Check that MASTER_ADDR and MASTER_PORT are the same everywhere and reachable from every node."
        ) from error
    return Meeting(rank, world_size, PrefixStore(secret, ours), secret, _host(init_method))


def signed(token: str, text: str) -> str:
    """What nobody can make of ``text`` without the ``token``."""
    return hmac.new(token.encode(), text.encode(), "sha256").hexdigest()


def _is_signed(token: str, text: str, given: str) -> bool:
    return hmac.compare_digest(signed(token, text).encode(), given.encode())


def _host(init_method: str) -> str | None:
    if init_method.startswith("env://"):
        return os.environ.get("MASTER_ADDR")
    return urlparse(init_method).hostname


def _name_of_attempt(store: Store, rank: int, world_size: int, timeout: timedelta, token: str) -> str:
    """A name that these ranks agree on, and no ranks before them had.

    A launcher that starts ranks again may keep the store, and with it the addresses of ranks that died.  Its count of
    restarts does not help: agents of several nodes count apart.  So every rank comes with a word of its own, rank 0
    answers to that word, and goes on answering until all have heard it, as the first words it finds may be old.  Words
    and answers are signed, so that neither side takes a stranger's.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"word/{rank}", f"{word} {signed(token, f'{rank} {word}')}")
        name, _, signature = store.get(f"name for/{word}").decode(errors="replace").partition(" ")
        if not _is_signed(token, f"{word} {name}", signature):
            store.set(f"{word} refused", "1")
            raise RuntimeError(f"whoever answered as rank 0 has {_ANOTHER}")
        store.add(f"{name}/heard", 1)
        return name
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    answered: set[str] = set()
    while store.add(f"{name}/heard", 0) < world_size - 1:
        here = [other for other in range(1, world_size) if store.check([f"word/{other}"])]
        for other in here:
            said = store.get(f"word/{other}").decode(errors="replace")
            if said in answered:
                continue
            word, _, signature = said.partition(" ")
            store.set(f"name for/{word}", f"{name} {signed(token, f'{word} {name}')}")
            if not _is_signed(token, f"{other} {word}", signature):
                with suppress(RuntimeError):  # the store may end with this process: let a rank hear the answer first
                    store.wait([f"{word} refused"], _FAREWELL)
                raise RuntimeError(f"whoever came as rank {other} has {_ANOTHER}")
            answered.add(said)
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {timeout} rank 0 had heard of {len(here)} other ranks only: {here}")
        time.sleep(_PAUSE)
    return name


_ANOTHER = (
    "another BMTRAIN_TOKEN than this process: every rank of a job must have the same in its environment, or none, and "
    "no other job may use the same address"
)
