"""Where a tensor that is spread over the ranks lies, and how it becomes whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch

from ..context import Context
from .layout import Layout
from .slices import Split, rows_in_whole, whole_shape


@dataclass(frozen=True, eq=False)
class Place:
    """That of parameter ``index`` of ``layout``, and of everything that was made from it; ``name`` is for messages."""

    ctx: Context
    layout: Layout
    index: int
    name: str
    split: Split | None = None
    """How a tensor-parallel layer's is cut, of which it is a slice."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole shape."""
        return self.layout.slots[self.index].shape

    @cached_property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape without tensor parallelism."""
        return whole_shape(self.ctx, self.shape, self.split)

    @cached_property
    def runs(self) -> tuple[int, list[tuple[int, int]]] | None:
        """Where this rank's slice lies in that: a dimension, and along it how many are neighbours there, from where."""
        split = self.split
        return None if split is None else (split.dim, rows_in_whole(self.ctx, self.shape[split.dim], split))

    @cached_property
    def copies(self) -> list[int]:
        """The ranks that keep the same part, this one included."""
        mesh = self.ctx.topology.mesh
        return mesh.group("replicate") if self.split is not None else mesh.group("replicate", "tensor")

    @cached_property
    def ranges(self) -> list[slice]:
        """Rank by rank of the shard group, which elements of the flattened whole it keeps."""
        return [self.layout.local(self.index, rank).whole for rank in range(self.layout.ranks)]

    @property
    def kept(self) -> slice:
        """The same of this rank."""
        return self.ranges[self.ctx.shard_rank]

    @cached_property
    def keepers(self) -> list[int]:
        """The ranks of the shard group that keep any."""
        return [rank for rank, kept in enumerate(self.ranges) if kept.stop > kept.start]

    def is_same(self, other: Place) -> bool:
        """Whether every rank keeps the same elements there."""
        return self.layout is other.layout and self.index == other.index

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """(n,) this rank's part of ``whole``, which has as many elements as there are here, the same on all ranks."""
        return whole.reshape(-1)[self.kept]

    def join(self, part: torch.Tensor, what: str) -> torch.Tensor:
        """The whole tensor, of which each rank gives its ``part``; on the device of ``part``.  Collective."""
        sizes = [kept.stop - kept.start for kept in self.ranges]
        rows = self.rows(torch.nn.functional.pad(part, (0, max(sizes) - part.numel())), what)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)]).view(self.shape)

    def same_on_replicas(self, drawn: torch.Tensor, what: str) -> torch.Tensor:
        """``drawn``, random numbers of the whole shape, or another rank's that keeps the same part.  Collective."""
        if self.ctx.replicate_group.world_size > 1:
            self.ctx.engine.comes_to(what)
            sent = drawn.to(self.ctx.device.torch_device)
            self.ctx.replicate_group.broadcast(sent, 0)
            return sent.to(drawn.device)
        return drawn

    def rows(self, facts: torch.Tensor, what: str) -> torch.Tensor:
        """(ranks, n) the ``facts``, (n,), of every rank of the shard group.  Collective."""
        ctx, kind, ranks = self.ctx, facts.dtype, self.layout.ranks
        if not facts.numel():
            return facts.new_empty(ranks, 0)
        sent = facts.to(ctx.device.torch_device).contiguous()
        if kind == torch.bool or kind.is_complex:
            sent = sent.view(torch.uint8)
        rows = torch.empty(ranks * sent.numel(), dtype=sent.dtype, device=sent.device)
        ctx.engine.all_gather(sent, rows, what)
        return rows.view(kind).view(ranks, -1).to(facts.device)

    def rows_of_slices(self, rows: torch.Tensor, what: str) -> torch.Tensor:
        """(slices, ranks, n) the ``rows``, (ranks, n), of every tensor-parallel rank.  Collective."""
        group, kind = self.ctx.tensor_group, rows.dtype
        sent = rows.to(self.ctx.device.torch_device).contiguous().view(-1).view(torch.uint8)
        every = torch.empty(group.world_size * sent.numel(), dtype=torch.uint8, device=sent.device)
        self.ctx.engine.comes_to(what)
        group.all_gather(sent, every)
        return every.view(kind).view(group.world_size, *rows.shape).to(rows.device)


class Home(Protocol):
    """Where a part lies that belongs to somebody else, such as a parameter."""

    is_gradient: ClassVar[bool]
    """For torch ``p.grad`` is one tensor however often it is asked for, while ``p.data`` is a new one each time."""

    @property
    def place(self) -> Place:
        """Which part it is; it may come to lie elsewhere."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def read(self) -> torch.Tensor:
        """(n,) the present values, not to be written."""

    def writing(self) -> AbstractContextManager[torch.Tensor]:
        """(n,) the present values, which the body may change in place."""


class Part:
    """This rank's part of a whole tensor: memory of its own, or that of a home."""

    __slots__ = ("__weakref__", "_home", "_own", "_place", "is_kept")

    def __init__(
        self, place: Place, own: torch.Tensor | None = None, home: Home | None = None, is_kept: bool = False
    ) -> None:
        self._place, self._own, self._home = place, own, home
        self.is_kept = is_kept  # whether something else keeps that memory, which is to see what is assigned

    @property
    def is_own(self) -> bool:
        """Whether it has memory of its own."""
        return self._home is None

    @property
    def is_gradient(self) -> bool:
        """Whether it is some parameter's gradient."""
        return self._home is not None and self._home.is_gradient

    @property
    def place(self) -> Place:
        """Which part it is."""
        return self._place if self._home is None else self._home.place

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self._home.dtype if self._own is None else self._own.dtype  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._home.device if self._own is None else self._own.device  # type: ignore[union-attr]

    def read(self) -> torch.Tensor:
        """(n,) the present values, not to be written."""
        return self._home.read() if self._own is None else self._own  # type: ignore[union-attr]

    def writing(self) -> AbstractContextManager[torch.Tensor]:
        """(n,) the present values, which the body may change in place."""
        return self._home.writing() if self._own is None else nullcontext(self._own)  # type: ignore[union-attr]

    def leave_home(self) -> None:
        """The home gets other values: keep the present ones, as whoever holds them expects."""
        if self._home is not None:
            self._place, self._own = self.place, self.read().clone()
            self._home = None

    def values_at(self, place: Place, what: str) -> torch.Tensor:
        """(n,) this rank's part as ``place`` lays it.  Collective if it lies elsewhere, where its own memory moves."""
        if self.place.is_same(place):
            return self.read()
        moved = place.cut(self.place.join(self.read(), what)).clone()
        if self.is_own:
            self._place, self._own = place, moved
        return moved
