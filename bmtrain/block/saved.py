"""Parts of gather buffers that autograd, or a recomputation, wants back later, when the buffer holds other values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch

from ..device import Device
from ..shard.flat import FlatShard
from ..shard.pools import Buffer, Pools
from ..shard.unit import ShardUnit


class PlaceInFlat(NamedTuple):
    """A view of a whole flat buffer, without the buffer; of numbers of ``dtype``, where the buffer's are ``base``.

    These are others in a view of pairs as complex numbers, or of a part of these, which may also stand for their
    conjugates or their negatives.
    """

    flat: FlatShard
    dtype: torch.dtype
    base: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    since: int
    is_conj: bool
    is_neg: bool

    @classmethod
    def of(cls, tensor: torch.Tensor, flat: FlatShard) -> PlaceInFlat:
        """Where ``tensor``, a part of ``flat``'s buffer, lies."""
        dtype, offset = tensor.dtype, int(tensor.storage_offset())
        base = dtype
        if dtype.is_complex != flat.dtype.is_complex:
            base = dtype.to_complex() if flat.dtype.is_complex else dtype.to_real()
        is_conj, is_neg = tensor.is_conj(), tensor.is_neg()
        return cls(flat, dtype, base, tensor.size(), tensor.stride(), offset, flat.steps, is_conj, is_neg)

    @property
    def numbers(self) -> list[int]:
        """Of the parameters that it is a part of."""
        slots, offset = enumerate(self.flat.layout.slots), self.offset * self.dtype.itemsize // self.base.itemsize
        return [number for number, slot in slots if slot.start <= offset < slot.end]

    def within(self, buffer: Buffer) -> torch.Tensor:
        """The view, made anew from a buffer that holds the values again."""
        base = buffer.tensor
        if base.dtype != self.base:  # pinned in another precision meanwhile
            base = base.to(self.base)
        if self.dtype == self.base:
            view = base.as_strided(self.size, self.stride, self.offset)
        else:
            other = torch.empty(0, dtype=self.dtype, device=base.device)
            view = other.set_(base.untyped_storage(), self.offset, self.size, self.stride)
        view = view.conj() if self.is_conj else view
        return -view if self.is_neg else view


class PlaceOfParameter(NamedTuple):
    """The view that a whole parameter is, without the buffer: most that are saved, and quicker to find again."""

    flat: FlatShard
    number: int
    dtype: torch.dtype
    since: int

    @property
    def numbers(self) -> list[int]:
        """That of the parameter."""
        return [self.number]

    def within(self, buffer: Buffer) -> torch.Tensor:
        """The same of a buffer that holds the values again."""
        view = buffer.views(self.flat.layout)[self.number]
        return view if view.dtype == self.dtype else view.to(self.dtype)


Place = PlaceInFlat | PlaceOfParameter


class KeptValues:
    """Buffers that hold the same whole values in the backward, as long as ``pools.changes`` stays ``changes``.

    Attributes:
        flats: by the address of a buffer's memory, what it holds.
    """

    def __init__(self, pools: Pools, flats: dict[int, FlatShard]) -> None:
        self.flats, self.pools, self.changes = flats, pools, pools.changes

    @classmethod
    def of(cls, pools: Pools, units: Iterable[ShardUnit]) -> KeptValues | None:
        """Those of ``units``; None unless every one that moves stays."""
        flats: dict[int, FlatShard] = {}
        for unit in units:
            kept = unit.kept_flats if unit.moves else {}
            if kept is None:
                return None
            flats |= kept
        return cls(pools, flats) if flats else None


class Buffers(Protocol):
    """Finds whole values, and gathers them again."""

    @property
    def device(self) -> Device:
        """Where they are."""

    @property
    def whole_storages(self) -> Mapping[int, FlatShard]:
        """By the address of a gather buffer's memory, the whole FlatShard that it holds; always up to date."""

    @property
    def kept(self) -> KeptValues | None:
        """What stays for the forward that is running; None unless everything does."""

    def flat_at(self, tensor: torch.Tensor) -> FlatShard | None:
        """The whole FlatShard (None if none) of whose gather buffer ``tensor`` is a part."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in memory of buffers or shards, whatever that holds now."""

    def rebuild(self, place: Place, autocast: torch.dtype | None) -> torch.Tensor:
        """A view of the re-gathered buffer."""
