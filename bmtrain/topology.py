"""Which ranks form which group.  Integers only; no torch, no communication."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import ClassVar, Literal

from .errors import ConfigurationError

Dimension = Literal["replicate", "shard", "pipe", "tensor"]


@dataclass(frozen=True)
class Mesh:
    """All ranks as a grid of four dimensions, numbered row by row: a tensor-parallel group is of neighbours.

    The names are those of ``torch.distributed.device_mesh.DeviceMesh``; it needs no process groups of torch's.

    replicate   ranks that keep the same parts of parameters
    shard       ranks that keep the parts of one copy of the parameters
    pipe        stages of one pipeline
    tensor      ranks that hold the slices of one tensor-parallel layer

    Ranks that differ in ``replicate``, ``shard`` or ``pipe`` train on different data: the stages of a pipeline read a
    batch each, and run through the pipeline together.  What is no stage's is spread over ``shard`` and ``pipe``.
    """

    shape: tuple[int, int, int, int]
    rank: int

    mesh_dim_names: ClassVar[tuple[Dimension, ...]] = ("replicate", "shard", "pipe", "tensor")

    def size(self, name: Dimension | None = None) -> int:
        """How many ranks there are along dimension ``name``, or in all."""
        return prod(self.shape) if name is None else self.shape[self._index(name)]

    def get_rank(self) -> int:
        """This process among all."""
        return self.rank

    def get_local_rank(self, name: Dimension) -> int:
        """This process's coordinate along dimension ``name``."""
        return self.get_coordinate()[self._index(name)]

    def get_coordinate(self) -> tuple[int, ...]:
        """All four coordinates of this process."""
        found, rest = [], self.rank
        for size in reversed(self.shape):
            rest, coordinate = divmod(rest, size)
            found.append(coordinate)
        return tuple(reversed(found))

    def group(self, *names: Dimension) -> list[int]:
        """The ranks that differ from this one along the dimensions ``names`` only, itself included, in order."""
        free = {self._index(name) for name in names}
        ranges = [
            range(size) if index in free else range(here, here + 1)
            for index, (size, here) in enumerate(zip(self.shape, self.get_coordinate(), strict=True))
        ]
        return [self._at(coordinate) for coordinate in product(*ranges)]

    def _at(self, coordinate: tuple[int, ...]) -> int:
        rank = 0
        for size, here in zip(self.shape, coordinate, strict=True):
            rank = rank * size + here
        return rank

    def _index(self, name: str) -> int:
        if name not in self.mesh_dim_names:
            raise ConfigurationError(f"The mesh has the dimensions {', '.join(self.mesh_dim_names)}, not {name!r}.")
        return self.mesh_dim_names.index(name)


@dataclass(frozen=True)
class Topology:
    """Where one rank stands among all: on its host and, by ``mesh``, in the job.

    ``shard_size`` None: all ranks that keep one stage, or whose data differ.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    tp_size: int = 1
    pipe_size: int = 1
    shard_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigurationError(f"RANK is {self.rank}, but WORLD_SIZE is {self.world_size}.")
        if self.tp_size < 1 or self.pipe_size < 1:
            raise ConfigurationError("tp_size and pipe_size must be at least 1.")
        if self.world_size % (self.tp_size * self.pipe_size):
            raise ConfigurationError(
                f"The world size {self.world_size} is not divisible by pipe_size * tp_size = "
                f"{self.pipe_size} * {self.tp_size}. Start a multiple of {self.pipe_size * self.tp_size} processes."
            )
        size = self.shard_size
        if size is not None and (type(size) is not int or size < 1 or self._stage_size % size):
            ranks = "ranks that see different data" if self.tp_size > 1 else "ranks"
            ranks += " of a stage" if self.pipe_size > 1 else ""
            good = [n for n in range(1, self._stage_size + 1) if not self._stage_size % n]
            raise ConfigurationError(
                f"shard_size is {size!r}, which does not divide the {self._stage_size} {ranks}. Parameters are sharded "
                f"over groups of shard_size ranks, all equally large: use one of {good}, such as the number of GPUs "
                "of one host."
            )

    @cached_property
    def mesh(self) -> Mesh:
        """The ranks as a grid."""
        shard = self.shard_size or self._stage_size
        return Mesh((self._stage_size // shard, shard, self.pipe_size, self.tp_size), self.rank)

    @cached_property
    def shard_rank(self) -> int:
        """Which parts of parameters this rank keeps."""
        return self.mesh.group("shard", "pipe").index(self.rank)

    @property
    def _stage_size(self) -> int:
        """How many pipelines there are, each with data of its own."""
        return self.world_size // (self.tp_size * self.pipe_size)

    @cached_property
    def pipeline(self) -> int:
        """Which of them this rank belongs to."""
        return self.mesh.group("replicate", "shard").index(self.rank)

    @property
    def tp_rank(self) -> int:
        """Position within the tensor-parallel group."""
        return self.mesh.get_local_rank("tensor")

    @property
    def pipe_rank(self) -> int:
        """Pipeline stage."""
        return self.mesh.get_local_rank("pipe")

    @cached_property
    def data_rank(self) -> int:
        """Position among the ranks that see different data."""
        return self.mesh.group("replicate", "shard", "pipe").index(self.rank)

    @property
    def data_ranks(self) -> list[int]:
        """Of the ranks that see the same data, the first of each."""
        return replace(self.mesh, rank=0).group("replicate", "shard", "pipe")

    @property
    def data_size(self) -> int:
        """How many ranks see different data."""
        return self.world_size // self.tp_size

    def tp_group(self) -> list[int]:
        """Ranks that hold the slices of one tensor-parallel layer with this rank."""
        return self.mesh.group("tensor")

    def pipe_group(self) -> list[int]:
        """Ranks that hold the stages of one pipeline with this rank."""
        return self.mesh.group("pipe")


def share(total: int, parts: int, index: int) -> range:
    """The half-open range of ``range(total)`` that part ``index`` of ``parts`` gets; the first parts get one more."""
    quotient, rest = divmod(total, parts)
    start = index * quotient + min(index, rest)
    return range(start, start + quotient + (index < rest))
