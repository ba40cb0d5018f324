"""This rank's part of some parameters, laid flat."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from .arenas import Arena
from .gradient import ShardGradient
from .layout import Layout, make_layout
from .parameter import (
    DistributedParameter,
    make_poison,
    raw_data,
    raw_grad,
    set_raw_grad,
    show_sharded,
    show_whole,
)  # fmt: skip
from .pool import Buffer, views_of

if TYPE_CHECKING:
    from .unit import ShardUnit


class FlatShard:
    """Parameters of one dtype in one flat buffer, of which each rank keeps an equal shard.

    Attributes:
        params, names: the parameters in the order of ``layout.slots``.
        gradient: this rank's reduced gradient.
        reached: parameters that the first backwards were about to give a gradient; None once this was compared.
        touched: for each parameter, whether this rank contributed to it; ranks may differ (experts without tokens).
        autocasts: whether the parameters belong to layers that autocast casts, so that they may be gathered cast.
        wire: dtype of the last gather, and so of computation.
        version: grows when values change, so that optimizers' masters of them can follow.
        remainder: (S,) int16, what bf16 values leave out of optimizers' fp32 values (``masters``); None if nothing.
    """

    def __init__(
        self, unit: ShardUnit, params: Sequence[DistributedParameter], names: Sequence[str], autocasts: bool
    ) -> None:
        self.unit = unit
        self.params, self.names = list(params), list(names)
        self.dtype = params[0].dtype
        self.layout: Layout = make_layout(tuple(tuple(p.shape) for p in params), unit.ctx.world_size)
        self._arena = self._new_shard()
        self.gradient = ShardGradient(self)
        self.touched = [False] * len(self.params)
        self.reached: set[int] | None = set()
        self.version = 0
        self.remainder: torch.Tensor | None = None
        self.autocasts = autocasts
        self.wire = self.dtype
        self.buffer: Buffer | None = None
        self._landing: tuple[Buffer, list[bool]] | None = None
        self._poison: list[torch.Tensor] = []
        self.forget_writes()
        for index, parameter in enumerate(self.params):
            if parameter._flat is not None:
                raise ConfigurationError(f"Parameter {names[index]!r} is sharded already.")
            self.local(self.shard, index).copy_(self.local_part(parameter.detach(), index))
        for index, parameter in enumerate(self.params):
            parameter._flat, parameter._index = self, index
            set_raw_grad(parameter, None)
        self.rest()

    @property
    def shard(self) -> torch.Tensor:
        """(S,) this rank's values, in the parameters' dtype."""
        return self._arena.tensor

    def _new_shard(self) -> Arena:
        arena = self.unit.pools.arenas.alloc(self.unit.ctx.gather, self.layout.shard_numel, self.dtype)
        arena.tensor.zero_()
        return arena

    # -- states ---------------------------------------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Whether the parameters show their values."""
        return self.buffer is not None or not self.unit.moves

    def rest(self) -> None:
        """Show what needs no gather buffer: poison, or the shard itself where nothing moves."""
        if self.buffer is not None:
            self.keep_writes()
        self.buffer = None
        if not self.unit.moves:
            for parameter, view in zip(self.params, self.views(self.shard), strict=True):
                show_whole(parameter, view)
            return
        if not self._poison:
            self._poison = [make_poison(slot.shape, self.dtype, self.shard.device) for slot in self.layout.slots]
        for parameter, poison in zip(self.params, self._poison, strict=True):
            show_sharded(parameter, poison)

    def show(self, buffer: Buffer) -> None:
        """Make the parameters views of ``buffer``, which holds all shards."""
        self.buffer = buffer
        for parameter, view in zip(self.params, buffer.views(self.layout), strict=True):
            show_whole(parameter, view)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Every parameter's view of a whole flat buffer."""
        return views_of(flat, self.layout)

    @property
    def casts(self) -> bool:
        """Whether these parameters may be gathered in another dtype than they rest in."""
        return self.autocasts or (self.unit.precision.param is not None and self.dtype.is_floating_point)

    @property
    def reduce_dtype(self) -> torch.dtype:
        """Dtype in which whole gradients are collected, sent and summed."""
        return self.unit.precision.reduce or self.wire

    def to_gather(self, compute: torch.dtype | None) -> torch.Tensor:
        """This rank's shard in the dtype to gather; ``compute`` is as in ``ShardUnit.start_gather``."""
        self.wire = compute if compute is not None and self.casts else self.dtype
        if self.wire == self.dtype:
            return self.shard
        cast = self.unit.pools.acquire_cast(self)
        cast.tensor.copy_(self.shard)
        self.unit.pools.casts.give_back(cast, self.unit.ctx.device.gather_stream)
        return cast.tensor

    # -- this rank's part -----------------------------------------------------------------------------------------

    def local(self, shard_like: torch.Tensor, index: int) -> torch.Tensor:
        """The part of parameter ``index`` within a tensor laid out like ``shard``: 1-D, may be empty."""
        start, end, _ = self.layout.local(self.layout.slots[index], self.unit.ctx.rank)
        return shard_like[start:end]

    def local_part(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        """The same part taken from a tensor of the parameter's whole shape."""
        start, end, offset = self.layout.local(self.layout.slots[index], self.unit.ctx.rank)
        return whole.reshape(-1)[offset : offset + end - start]

    def write(self, index: int, whole: torch.Tensor) -> None:
        """Replace parameter ``index`` by ``whole`` (its whole shape, the same on all ranks)."""
        with torch.no_grad():
            self.write_local(index, lambda part: part.copy_(self.local_part(whole, index)))

    def write_local(self, index: int, write: Callable[[torch.Tensor], Any]) -> None:
        """Let ``write`` change this rank's part of parameter ``index`` in place, on all ranks alike."""
        part = self.local(self.shard, index)
        before = None if self.remainder is None else part.clone()
        write(part)
        if self.remainder is not None and before is not None:
            self.local(self.remainder, index).masked_fill_(part != before, 0)
        self.changed()

    def keep_whole_values(self) -> None:
        """Take this rank's part of what the gather buffer holds now."""
        if self.buffer is not None:
            start, end = self.layout.shard_range(self.unit.ctx.rank)
            part = self.buffer.tensor[start:end]
            if part.dtype != self.shard.dtype:  # gathered in low precision: what was not written stays as precise
                part = torch.where(part != self.shard.to(part.dtype), part.to(self.shard.dtype), self.shard)
            if self.remainder is not None:
                self.remainder.masked_fill_(part != self.shard, 0)
            self.shard.copy_(part)
        self.changed(discard=False)

    def changed(self, discard: bool = True) -> None:
        """Values changed; ``discard`` drops a gather of the old ones that is under way."""
        self.version += 1
        if discard:
            self.unit.discard()

    # -- writes into whole parameters -----------------------------------------------------------------------------

    def expose(self) -> None:
        """User code holds ``p.data`` of a whole parameter, and may write to it unseen."""
        self._exposed = True

    def write_whole(self, index: int, value: torch.Tensor) -> None:
        """``p.data = value`` for a whole parameter."""
        raw_data(self.params[index]).copy_(value)
        self.expose()

    def keep_writes(self) -> None:
        """Keep what user code wrote into whole parameters in place, as in an unsharded model."""
        if self._exposed or self._versions != self._present_versions():
            self.forget_writes()
            self.keep_whole_values()

    def forget_writes(self) -> None:
        """What was written until now is kept already, or unwanted."""
        self._exposed, self._versions = False, self._present_versions()

    def _present_versions(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [p._version for p in self.params]

    def convert(self, shard: torch.Tensor) -> None:
        """Replace the shard by ``shard``, maybe of another dtype.  Gradients are dropped."""
        assert shard.shape == self.shard.shape
        self.dtype = self.wire = shard.dtype
        self.remainder = None
        self._arena = self._new_shard()
        self.shard.copy_(shard)
        self.gradient, self.touched, self._poison = ShardGradient(self), [False] * len(self.params), []
        self.version += 1
        self.rest()

    # -- gradients ------------------------------------------------------------------------------------------------

    @property
    def trainable(self) -> bool:
        """Whether any parameter here gets a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return any(p.requires_grad for p in self.params)

    @property
    def lands(self) -> bool:
        """Whether gradients may be computed straight into the buffer that is reduced."""
        return self.is_whole and self.reduce_dtype == self.wire

    def landing(self, index: int) -> tuple[torch.Tensor, bool]:
        """Where a whole gradient of parameter ``index`` goes to be reduced, and whether it is the first to come."""
        if self._landing is None:
            buffer = self.unit.pools.acquire_grads(self)
            self._landing = (buffer, [False] * len(self.params))
        buffer, landed = self._landing
        first, landed[index] = not landed[index], True
        return buffer.views(self.layout)[index], first

    def index_at(self, offset: int) -> int:
        """The parameter that begins at ``offset`` of a whole flat buffer."""
        return next(i for i, slot in enumerate(self.layout.slots) if slot.start == offset and slot.numel)

    def add_raw_grad(self, index: int, whole: torch.Tensor) -> None:
        """Add to the gradient that autograd has accumulated for parameter ``index``."""
        present = raw_grad(self.params[index])
        set_raw_grad(self.params[index], whole if present is None else present + whole)

    def take_landing(self) -> tuple[Buffer, list[bool]]:
        """The buffer to reduce, and which parameters' gradients are in it already."""
        taken, self._landing = self._landing, None
        return taken or (self.unit.pools.acquire_grads(self), [False] * len(self.params))

    @property
    def has_landed(self) -> bool:
        """Whether whole gradients wait in the buffer."""
        return self._landing is not None and any(self._landing[1])

    def raw_grads(self) -> list[torch.Tensor | None]:
        """What autograd has accumulated and nobody reduced yet."""
        with torch._C.DisableTorchFunctionSubclass():
            return [raw_grad(p) for p in self.params]

    def clear_grad(self) -> None:
        """Forget the gradient; its memory stays for the next one."""
        self.gradient.clear()
        for index, parameter in enumerate(self.params):
            self._forget_grad(index)
            set_raw_grad(parameter, None)

    def set_grad(self, index: int, whole: torch.Tensor | None) -> None:
        """Replace one parameter's gradient (whole shape, the same on all ranks) or drop it."""
        if whole is None:
            if self.gradient.present:
                self.local(self.gradient.settled(), index).zero_()
            self._forget_grad(index)
            return
        self.local(self.gradient.zeros(), index).copy_(self.local_part(whole, index))
        self.touched[index] = True

    def warn_of_untrained(self, touched: Sequence[bool]) -> None:
        """At the first step: ``touched`` says of each parameter whether any rank has a gradient for it."""
        reached, self.reached = self.reached or set(), None
        with torch._C.DisableTorchFunctionSubclass():
            missing = [self.names[i] for i in sorted(reached) if not touched[i] and self.params[i].requires_grad]
        if missing:
            warnings.warn(
                f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} took "
                "part in the loss, but no rank got a gradient: they do not train. If an autograd function means to "
                "give them none, or compiled code uses them detached only, say so with requires_grad_(False).",
                stacklevel=2,
            )

    def _forget_grad(self, index: int) -> None:
        self.touched[index] = False
        if self._landing is not None:  # of a backward that an exception ended
            self._landing[1][index] = False

    def visible_grad(self, index: int) -> torch.Tensor | None:
        """What ``parameter.grad`` shows for a reduced gradient."""
        if not self.touched[index] or not self.gradient.present:
            return None
        slot = self.layout.slots[index]
        if self.unit.ctx.world_size == 1:
            return self.gradient.settled()[slot.start : slot.end].view(slot.shape)
        return make_poison(slot.shape, self.dtype, self.shard.device)
