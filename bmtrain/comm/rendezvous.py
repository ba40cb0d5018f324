"""How processes find each other: torchrun's environment, or one process alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import CommunicationError


@dataclass(frozen=True)
class Meeting:
    """What a rank knows once all ranks have met."""

    rank: int
    world_size: int
    store: Store


def meet(init_method: str, rank: int, world_size: int, timeout: timedelta) -> Meeting:
    """Meet the other ranks through ``init_method`` (``env://``, ``tcp://HOST:PORT`` or ``file://PATH``)."""
    if world_size == 1:
        return Meeting(0, 1, PrefixStore("bmtrain", HashStore()))
    try:
        store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
    except (RuntimeError, ValueError) as error:
        raise CommunicationError(
            f"The {world_size} ranks could not meet through {init_method!r}: {error}. "
            "Check that MASTER_ADDR and MASTER_PORT are the same everywhere and reachable from every node."
        ) from error
    store.set_timeout(timeout)
    return Meeting(rank, world_size, PrefixStore("bmtrain", store))
