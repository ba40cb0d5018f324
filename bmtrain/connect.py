"""Makes the communicators of this rank: one for each group of ranks and each kind of traffic."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from .comm import (
    Communicator,
    GlooCommunicator,
    LocalCommunicator,
    ReplicatedCommunicator,
    WatchedCommunicator,
)
from .device import Device
from .errors import CommunicationError
from .topology import Dimension, Topology
from .watch import Diary, Watchdog

_Connect = Callable[[str, str, int, int], Communicator]
_GATHERS = ("gather", "stage/gather")
_RARE = ("world", "shard", "replicate", "model", "data", "stage", "stage/data")


@dataclass(frozen=True)
class Collectives:
    """How parameters become whole, and gradients parts."""

    gather: Communicator
    """Gathers of parameters; apart from ``reduce``, so that neither waits for the other."""
    reduce: Communicator
    """Reductions of gradients: their sum over all ranks that have some, of which this one keeps its part."""
    reduce_unsliced: Communicator
    """The same for parameters that are no slices, which tensor-parallel ranks keep alike: their sum over these, too."""


@dataclass(eq=False)
class Connector:
    """Connects this rank with others.  Every method is called by all ranks, in one order."""

    topology: Topology
    device: Device
    store: Store
    timeout: timedelta
    diary: Diary
    watchdog: Watchdog | None = None
    """Watches what is connected from then on."""
    _on_device: list[Communicator] = field(default_factory=list)
    """What another thread may end; gloo waits until its connections end."""
    _first_on_host: GlooCommunicator | None = None
    """The first for CPU tensors, whose port the others share."""
    _groups: list[tuple[list[int], Communicator]] = field(default_factory=list)

    def abort(self) -> None:
        """End what is connected on a device."""
        for communicator in self._on_device:
            with suppress(CommunicationError):  # the others must be freed, too
                communicator.abort()

    def check(self) -> None:
        """Raises CommunicationError if a connection on a device has failed."""
        for communicator in self._on_device:
            communicator.check_async_error()

    def on_host(self, name: str, ranks: list[int]) -> Communicator:
        """``ranks``, this one among them, for CPU tensors; other groups of the same ``name`` meet elsewhere."""
        return self._connected(self._gloo, name, ranks)

    def on_device(self, name: str, ranks: list[int]) -> Communicator:
        """The same for tensors of this rank's device."""
        return self._connected(self._nccl if self.device.is_cuda else self._gloo, name, ranks)

    def group(self, name: str, *dimensions: Dimension) -> Communicator:
        """The ranks that differ from this one in ``dimensions`` only, on the device; one for equal groups."""
        ranks = self.topology.mesh.group(*dimensions)
        for others, made in self._groups:
            if others == ranks:
                return made
        self._groups.append((ranks, self.on_device(name, ranks)))
        return self._groups[-1][1]

    def collectives(self, prefix: str, *dimensions: Dimension) -> Collectives:
        """Of parameters whose parts are spread along ``dimensions``."""
        mesh = self.topology.mesh
        ranks, replicas = mesh.group(*dimensions), mesh.group("replicate")
        gather, reduce = self.on_device(f"{prefix}gather", ranks), self.on_device(f"{prefix}reduce", ranks)
        if len(replicas) > 1:
            reduce = ReplicatedCommunicator(reduce, self.on_device(f"{prefix}reduce/replicas", replicas))
        reduce_unsliced = reduce
        if mesh.size("tensor") > 1:
            tensors = self.on_device(f"{prefix}reduce/tensor", mesh.group("tensor"))
            reduce_unsliced = ReplicatedCommunicator(reduce, tensors)
        return Collectives(gather, reduce, reduce_unsliced)

    def _connected(self, connect: _Connect, name: str, ranks: list[int]) -> Communicator:
        if len(ranks) == 1:
            return LocalCommunicator()
        place = name if len(ranks) == self.topology.world_size else f"{name}/{ranks[0]}"
        made = connect(name, place, ranks.index(self.topology.rank), len(ranks))
        if self.watchdog is None:
            return made
        return WatchedCommunicator(made, name, self.diary, self.watchdog, self.device.waits, ranks)

    def _gloo(self, name: str, place: str, rank: int, size: int) -> Communicator:
        made = GlooCommunicator(PrefixStore(place, self.store), rank, size, self.timeout, self._first_on_host)
        self._first_on_host = self._first_on_host or made
        return made

    def _nccl(self, name: str, place: str, rank: int, size: int) -> Communicator:
        from .comm.nccl import NcclCommunicator, Policy
        from .comm.staged import StagedCommunicator

        # The zero-CTA policy moves gathers with copy engines and leaves the multiprocessors to the GEMMs beside them.
        policy: Policy = "zero" if name in _GATHERS else "default"
        kind = StagedCommunicator if name in _RARE else NcclCommunicator
        store: Any = self.store  # it takes bytes; torch's annotations do not say so
        self._on_device.append(kind(store, place, rank, size, self.device.torch_device, policy=policy))
        return self._on_device[-1]
