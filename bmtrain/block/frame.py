"""One forward of a block, as autograd sees it: what it saves, and how that comes back in the backward.

Autograd hands every tensor it saves to ``pack`` and asks for it again with ``unpack``.  A view of a gather buffer is
never kept: by the backward the buffer holds another block, so it is stored as a place in its FlatShard and rebuilt
from the re-gathered buffer.  Other tensors are kept, or, for a recomputed block, numbered and made again by running
the block once more; that second run stops after the last tensor that is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConfigurationError
from ..shard.flat import FlatShard
from ..shard.unit import ShardUnit

if TYPE_CHECKING:
    from .engine import Engine
    from .memory import RecomputePlan


class PlaceInFlat(NamedTuple):
    """A view of a whole flat buffer, without the buffer."""

    flat: FlatShard
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def within(self, base: torch.Tensor) -> torch.Tensor:
        """The view, made anew from a buffer that holds the values again."""
        if base.dtype != self.dtype:  # pinned in another precision meanwhile
            base = base.to(self.dtype)
        return base.as_strided(self.size, self.stride, self.offset)


class _Enough(BaseException):
    """The recomputation has made everything that is needed.  Not an Exception, so that user code does not catch it."""


class Frame:
    """One use of a unit under autograd."""

    def __init__(
        self,
        engine: Engine,
        unit: ShardUnit | None,
        parent: Frame | None,
        recompute: bool,
        plan: RecomputePlan | None = None,
    ) -> None:
        self.engine, self.parent, self.recompute = engine, parent, recompute
        self.units: list[ShardUnit] = []
        self.begun = self.finished = False
        self.autocast = engine.ctx.device.autocast()
        self._facts: list[tuple[torch.Size, torch.dtype]] = []  # of what is to be made again
        self._plan, self._storages = plan, dict[int, int]()
        self._made: dict[int, torch.Tensor] = {}
        self._again: Callable[[], Any] | None = None
        if unit is not None:
            self.add(unit)

    def add(self, unit: ShardUnit) -> None:
        """This forward also uses ``unit``."""
        if unit not in self.units:
            self.units.append(unit)
            unit.open_uses += 1

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block's forward, recording what autograd saves."""
        if self.recompute:
            self._again = _Repeat(self.engine, call, args, kwargs)
        with self.hooks():
            out = call(*args, **kwargs)
        if self._plan is not None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):  # held for the recomputation anyway
                    self._storages.pop(tensor.untyped_storage().data_ptr(), None)
            self._plan.measured(self.units[0], sum(self._storages.values()))
            self._storages.clear()
        return out

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Record what autograd saves inside the ``with``."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        flat = self.engine.residency.find(tensor.untyped_storage().data_ptr())
        if flat is not None:
            return PlaceInFlat(flat, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        if not self.recompute:
            return tensor
        if self._plan is not None:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        self._facts.append((tensor.shape, tensor.dtype))
        return len(self._facts) - 1

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not self.begun:
            self.engine.backward_reaches(self)
        if isinstance(packed, PlaceInFlat):
            return self.engine.rebuild(packed, self.autocast)
        if isinstance(packed, torch.Tensor):
            return packed
        tensor = self._made.pop(packed, None)
        if tensor is None:
            self._recompute()
            tensor = self._made.pop(packed)
        return tensor

    def _recompute(self) -> None:
        made: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> Any:
            flat = self.engine.residency.find(tensor.untyped_storage().data_ptr())
            if flat is None:
                made[len(made)] = tensor
                if len(made) == len(self._facts):
                    raise _Enough
            return None

        assert self._again is not None
        try:
            with self.engine.recomputing(self, pack), torch.autograd.graph.saved_tensors_hooks(pack, _never):
                self._again()
        except _Enough:
            pass
        if [(tensor.shape, tensor.dtype) for tensor in made.values()] != self._facts:
            raise ConfigurationError(
                f"Recomputing {self.units[0].name if self.units else 'a block'} did not save the tensors that its "
                f"forward saved ({len(made)} of {len(self._facts)}, or of other shapes): the block does not do the "
                "same twice, as one that fills a cache it is given. Train without the cache (use_cache=False), or use "
                "bmt.Block(..., use_checkpoint=False) for it."
            )
        self._made = made


def _never(packed: Any) -> torch.Tensor:
    raise ConfigurationError(
        "A recomputed block runs a backward of its own (torch.autograd.grad) in its forward, and what that needs is "
        "not kept when the block runs again. Use bmt.Block(..., use_checkpoint=False) for it."
    )


@dataclass(frozen=True, eq=False)
class _Borrowed:
    """A block's input that is a view of a parameter. Not a tuple, so that it is a leaf among the inputs."""

    place: PlaceInFlat
    requires_grad: bool


class _Repeat:
    """A forward that can be run once more under the same generator and autocast state."""

    def __init__(self, engine: Engine, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._engine, self._device = engine, engine.ctx.device
        self._call, self._inputs = call, self._kept((args, kwargs))
        self._versions = [t._version for t in tree_leaves(self._inputs) if isinstance(t, torch.Tensor)]
        self._rng = self._device.rng_state()
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        ]

    def __call__(self) -> Any:
        if self._versions != [t._version for t in tree_leaves(self._inputs) if isinstance(t, torch.Tensor)]:
            raise ConfigurationError(
                "A recomputed block changed one of its inputs in place (or the input was changed after it ran), so it "
                "cannot be run again from that input. Use bmt.Block(..., use_checkpoint=False) for it, or write "
                "x = x + y for x += y."
            )
        buffers = _buffers(getattr(self._call, "__self__", None))
        present = self._device.rng_state()
        self._device.set_rng_state(self._rng)
        try:
            with ExitStack() as stack:
                args, kwargs = self._detached(stack)
                stack.enter_context(torch.enable_grad())
                for kind, enabled, dtype in self._autocast:
                    if enabled or torch.is_autocast_enabled(kind):
                        stack.enter_context(torch.amp.autocast(kind, dtype=dtype, enabled=enabled))
                return self._call(*args, **kwargs)
        finally:
            self._device.set_rng_state(present)
            for holder, name, buffer, value in buffers:
                buffer.data.copy_(value)  # past autograd's version count: the same values return
                holder[name] = buffer

    def _kept(self, inputs: Any) -> Any:
        """``inputs`` to be held until the backward: without gather buffers, which by then hold other values."""
        made: dict[int, _Borrowed] = {}

        def kept(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
                return value
            flat = self._engine.residency.find(value.untyped_storage().data_ptr())
            if flat is None:
                return value
            offset = int(value.storage_offset())
            place = PlaceInFlat(flat, value.dtype, value.size(), value.stride(), offset)
            return made.setdefault(id(value), _Borrowed(place, value.requires_grad))

        return tree_map(kept, inputs)

    def _detached(self, stack: ExitStack) -> Any:
        """Copies of the inputs outside the graph; what was one tensor stays one (attention asks ``query is key``).

        Parts of gather buffers are whole again until ``stack`` ends.
        """
        made: dict[int, torch.Tensor] = {}

        def detached(value: Any) -> Any:
            if not isinstance(value, (torch.Tensor, _Borrowed)) or isinstance(value, torch.nn.Parameter):
                return value
            if id(value) not in made:
                present = self._present(value, stack) if isinstance(value, _Borrowed) else value
                made[id(value)] = present.detach().requires_grad_(value.requires_grad)
            return made[id(value)]

        return tree_map(detached, self._inputs)

    def _present(self, borrowed: _Borrowed, stack: ExitStack) -> torch.Tensor:
        unit = borrowed.place.flat.unit
        tensor = self._engine.rebuild(borrowed.place, self._device.autocast())
        unit.pins += 1

        def unpin() -> None:
            unit.pins -= 1

        stack.callback(unpin)
        return tensor


def _buffers(module: Any) -> list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]:
    """Every buffer with a copy: running statistics and counters must not move a second time."""
    if not isinstance(module, torch.nn.Module) or not module.training:
        return []
    return [
        (inner._buffers, name, buffer, buffer.clone())
        for inner in module.modules()
        for name, buffer in inner._buffers.items()
        if buffer is not None
    ]
