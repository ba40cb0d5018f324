"""One forward of a block, as autograd sees it: what it saves, and how that comes back in the backward.

Autograd hands every tensor it saves to ``pack`` and asks for it again with ``unpack``.  A view of a gather buffer is
never kept: by the backward the buffer holds another block, so it is stored as a place in its FlatShard and rebuilt
from the re-gathered buffer.  Other tensors are kept, or, for a recomputed block, numbered and made again by running
the block once more; that second run stops after the last tensor that is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from ..alike import differ, sums_of
from ..autograd import ScriptsAsWritten, of_no_graph, running_node_saves_with, runs_as_written
from ..errors import ConfigurationError, InPlaceError
from ..shard.flat import FlatShard
from ..shard.parameter import DistributedParameter
from ..shard.unit import ShardUnit
from .memory import MemoryPlan
from .repeat import Repeat
from .saved import Buffers, Place, PlaceInFlat, PlaceOfParameter

T = TypeVar("T")


class Owner(Buffers, Protocol):
    """What a frame asks of the backward that it takes part in."""

    def will_repeat(self) -> None:
        """A block that begins now is to run again in the backward."""

    @property
    def peeks(self) -> bool:
        """Whether somebody looks at what was saved, before a backward needs it."""

    def reached(self, frame: Frame) -> None:
        """The backward needs something that ``frame`` saved."""

    def recomputing(self, frame: Frame, note: Callable[[torch.Tensor], object]) -> AbstractContextManager[None]:
        """Around the second run of a block's forward; ``note`` is told of every tensor it would save."""


class NotKeptError(Exception):
    """What is looked at is to be gathered or recomputed in the backward."""


class _Enough(BaseException):
    """The recomputation has made everything that is needed.  Not an Exception, so that user code does not catch it."""


class Frame:
    """One use of a unit under autograd."""

    def __init__(
        self,
        owner: Owner,
        unit: ShardUnit | None,
        parent: Frame | None,
        recompute: bool,
        plan: MemoryPlan | None = None,
    ) -> None:
        self.owner, self.parent, self.recompute = owner, parent, recompute
        self._whole = owner.whole_storages
        kept = None if recompute else owner.kept
        self._kept = None if kept is None or kept.pools.changes != kept.changes else kept
        self.units: list[ShardUnit] = []
        self.begun = self.finished = False
        self.autocast = owner.device.autocast()
        self._facts: list[tuple[torch.Size, torch.dtype]] = []  # of what is to be made again
        self._sums: list[torch.Tensor] | None = None  # of the same, in a block's first runs
        self._plan, self._storages = plan, dict[int, int]()
        self._made: dict[int, tuple[torch.Tensor, int]] = {}
        self._again: Repeat | None = None
        self._steps: list[tuple[FlatShard, int]] = []  # how many of each the forward came after
        self._held: list[tuple[torch.Tensor, int]] | None = None  # until it is known whether the block can run again
        self._keeps = False  # what is held, whatever the block could do
        self._second: Frame | None = None  # of what nodes of the backward save, where that is differentiated
        if unit is not None:
            self.add(unit)

    def add(self, unit: ShardUnit) -> None:
        """This forward also uses ``unit``."""
        if unit not in self.units:
            self.units.append(unit)
            unit.open_uses += 1

    def keep_saved(self) -> bool:
        """Whether nothing that was saved so far is to be made by running again; what is to come is kept, too."""
        if not self.recompute:
            return True
        self._keeps = self._keeps or self._held is not None or not self._facts
        if self._keeps and self._held is None:
            self._held = []
        return self._keeps

    def reach(self) -> None:
        """The backward needs what this forward has saved elsewhere."""
        if not self.begun:
            self.owner.reached(self)

    def run(self, call: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> T:
        """Run the block's forward, recording what autograd saves."""
        if self.recompute:
            out = self._run_first(Repeat(self.owner, call, args, kwargs), call, args, kwargs)
        else:
            with self.hooks():
                out = call(*args, **kwargs)
        if self._plan is not None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                    self._storages.pop(tensor.untyped_storage().data_ptr(), None)  # held for the recomputation anyway
            self._plan.measured(self.units[0], sum(self._storages.values()))
            self._storages.clear()
        return out

    def _run_first(
        self, again: Repeat, call: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> T:
        self._again, self._held = again, [] if again.watches else None
        self._sums = [] if again.is_observed else None
        self.owner.will_repeat()
        with self.hooks():
            out = call(*args, **kwargs)
        if again.first_run_is_over() and not self._keeps:
            self._held = None
        self._steps = [(flat, flat.steps) for unit in self.units for flat in unit.flats]
        return out

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Record what autograd saves inside the ``with``."""
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            raise ConfigurationError(
                "A distributed model runs inside torch.autograd.graph.disable_saved_tensors_hooks, without which whole "
                "parameters would stay until the backward. Leave it out around the model."
            )
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @runs_as_written
    def _pack(self, tensor: torch.Tensor) -> Any:
        kept = self._kept
        if kept is not None and type(tensor) is torch.Tensor and kept.pools.changes == kept.changes:
            # Without a look at what it is; a parameter would show something else by the backward.
            return of_no_graph(tensor), tensor._version
        if type(tensor) is DistributedParameter:
            home = tensor._flat
            if isinstance(home, FlatShard) and home.buffer is not None:
                return PlaceOfParameter(home, tensor._index, tensor.dtype, home.steps)
        # A sparse one is no part of a buffer, nor is what forward-mode differentiation has for zeros.
        strided = tensor.layout is torch.strided and not tensor._is_zerotensor()
        flat = self._whole.get(tensor.untyped_storage().data_ptr()) if strided else None  # asked of all that is saved
        if flat is not None:
            return PlaceInFlat.of(tensor, flat)
        if not self.recompute:
            # It may lie where a buffer lay when the forward began.
            keep, version = of_no_graph(tensor), _version(tensor)
            return (keep, version) if kept is None else (keep, version, "no buffer's")
        if self._plan is not None and strided:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        if self._held is not None:
            self._held.append((tensor.detach(), _version(tensor)))
        self._facts.append((tensor.shape, tensor.dtype))
        if self._sums is not None:
            self._sums.append(_sums(tensor))
        return len(self._facts) - 1

    @runs_as_written
    def _unpack(self, packed: Any) -> torch.Tensor:
        if not self.begun:
            if self.owner.peeks:
                return self._peek(packed)
            self.owner.reached(self)
        kept = self._kept
        if type(packed) is tuple:
            tensor: torch.Tensor = packed[0]
            flat = None
            if kept is not None and len(packed) == 2:
                if torch.is_grad_enabled() or kept.pools.changes != kept.changes:
                    flat = (
                        kept.flats.get(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else None
                    )
            if flat is None:
                return self._unchanged(tensor, packed[1])
            packed = PlaceInFlat.of(tensor, flat)
        if isinstance(packed, Place):
            if torch.is_grad_enabled():  # create_graph=True: what this node saves of the buffer is no more to be kept
                if self._second is None:
                    self._second = Frame(self.owner, None, None, recompute=False)
                    self._second.autocast = self.autocast
                running_node_saves_with(self._second._pack, self._second._unpack)
            return self.owner.rebuild(packed, self.autocast)
        if self._held is not None:
            return self._unchanged(*self._held[packed])
        if packed not in self._made:
            self._recompute()
        return self._unchanged(*self._made.pop(packed))

    def _unchanged(self, tensor: torch.Tensor, version: int) -> torch.Tensor:
        if _version(tensor) != version:
            block = (self.units and self.units[0].name) or "the model"
            raise InPlaceError(
                f"A tensor of shape {tuple(tensor.shape)} that the backward of {block} needs was changed in place "
                "after it was used, as by x += y, x[0] = 0 or relu_(x). Write x = x + y, or change a copy (x.clone()): "
                "torch says so, too, on one process."
            )
        return tensor

    def _peek(self, packed: Any) -> torch.Tensor:
        tensor = packed[0] if type(packed) is tuple else packed
        if self._held is not None and isinstance(packed, int):
            tensor = self._held[packed][0]
        if not isinstance(tensor, torch.Tensor):
            raise NotKeptError
        return tensor

    def _recompute(self) -> None:
        made: dict[int, tuple[torch.Tensor, int]] = {}
        sums: list[torch.Tensor] = []

        @runs_as_written
        def pack(tensor: torch.Tensor) -> Any:
            if self.owner.flat_at(tensor) is None:
                made[len(made)] = of_no_graph(tensor), _version(tensor)
                if self._sums is not None:
                    sums.append(_sums(tensor))
                if len(made) == len(self._facts):
                    raise _Enough
            return None

        assert self._again is not None
        for flat, since in self._steps:
            flat.require_unchanged(range(len(flat.params)), since, _AGAIN)
        try:
            with (
                self.owner.recomputing(self, pack),
                ScriptsAsWritten(),
                torch.autograd.graph.saved_tensors_hooks(pack, _never),
            ):
                self._again()
        except _Enough:
            pass
        except RuntimeError:  # what TorchScript makes of _Enough
            if len(made) < len(self._facts):
                raise
        if [(tensor.shape, tensor.dtype) for tensor, _ in made.values()] != self._facts:
            raise ConfigurationError(
                f"Recomputing {(self.units and self.units[0].name) or 'a block'} did not save the tensors that its "
                f"forward saved ({len(made)} of {len(self._facts)}, or of other shapes): the block does not do the "
                "same twice, as one that fills a cache it is given. Train without the cache (use_cache=False), or use "
                "bmt.Block(..., use_checkpoint=False) for it."
            )
        if self._sums and bool(differ(torch.stack([_on_host(self._sums), _on_host(sums)])).any()):
            raise ConfigurationError(
                f"Recomputing {(self.units and self.units[0].name) or 'a block'} gave other values than its forward: "
                "the block does not do the same twice. It draws from a generator that is no attribute of its modules, "
                "where one (torch.Generator, numpy.random.Generator) is put back; or what it reads outside of itself "
                "has changed since. Make that an attribute or an argument, or use bmt.Block(..., use_checkpoint=False)."
            )
        self._made = made


_AGAIN = (
    ". A recomputed block needs all of its parameters for that, also those whose values torch would not keep; with "
    "bmt.Block(..., use_checkpoint=False) it does not"
)


def _version(tensor: torch.Tensor) -> int:
    """How often an ordinary tensor was changed in place."""
    return tensor._version if type(tensor) is torch.Tensor else 0


@torch.no_grad()
def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """(4,) by which to see whether a second run makes the same; zeros of what is no result (the bytes of an LSTM)."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_meta:
        return torch.zeros(4, device=tensor.device)
    if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        return torch.zeros(4, device=tensor.device)
    values = tensor.detach().reshape(-1)
    if tensor.dtype not in _SUMMED:  # a copy, so not for what is large
        values = values.half() if tensor.dtype == torch.bool else values.float()
    return sums_of(values)


_SUMMED = (torch.float32, torch.bfloat16, torch.float16)


def _on_host(sums: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([one.cpu() for one in sums])


def _never(packed: Any) -> torch.Tensor:
    raise ConfigurationError(
        "A recomputed block runs a backward of its own (torch.autograd.grad) in its forward, and what that needs is "
        "not kept when the block runs again. Use bmt.Block(..., use_checkpoint=False) for it."
    )
