"""Which ranks form which group.  Integers only; no torch, no communication."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigurationError


@dataclass(frozen=True)
class Topology:
    """Where one rank stands in the world.

    The world is laid out as (data, pipeline, tensor), tensor-parallel ranks adjacent.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    tp_size: int = 1
    pipe_size: int = 1

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

    @property
    def tp_rank(self) -> int:
        """Position within the tensor-parallel group."""
        return self.rank % self.tp_size

    @property
    def pipe_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // self.tp_size % self.pipe_size

    @property
    def data_rank(self) -> int:
        """Position among the ranks that see different data."""
        return self.rank // (self.tp_size * self.pipe_size)

    @property
    def data_size(self) -> int:
        """How many ranks see different data."""
        return self.world_size // (self.tp_size * self.pipe_size)

    def tp_group(self) -> list[int]:
        """Ranks that hold the slices of one tensor-parallel layer with this rank."""
        first = self.rank - self.tp_rank
        return list(range(first, first + self.tp_size))

    def pipe_group(self) -> list[int]:
        """Ranks that hold the stages of one pipeline with this rank."""
        stride = self.tp_size
        first = self.rank - self.pipe_rank * stride
        return [first + stage * stride for stage in range(self.pipe_size)]


def share(total: int, parts: int, index: int) -> range:
    """The half-open range of ``range(total)`` that part ``index`` of ``parts`` gets; the first parts get one more."""
    quotient, rest = divmod(total, parts)
    start = index * quotient + min(index, rest)
    return range(start, start + quotient + (index < rest))
