"""A stack of blocks that is a list and can also be called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ConfigurationError
from ..precision import Precision
from ..shard.engine import engine
from .block import Block
from .record import unit_of

ListT = TypeVar("ListT", bound="TransformerBlockList")


class TransformerBlockList(nn.ModuleList):
    """An ``nn.ModuleList`` whose elements are Blocks; called, it runs them one after the other.

    Args:
        modules: the elements; those that are not Blocks yet become Blocks.
        num_hidden: how many of the positional arguments each block replaces by its results.
        sqrt: accepted for older scripts; what is recomputed is decided by memory (see ``Block``).
        precision, use_checkpoint: of the elements that become Blocks here; Blocks keep their own (see ``Block``).

    ``list(h, a, b, key=c)`` with ``num_hidden=1`` is ``for block in list: h = block(h, a, b, key=c)``; with
    ``num_hidden=2`` it is ``for block in list: h, a = block(h, a, b, key=c)``.  Loops over the list work unchanged.
    Elements without a forward, such as pairs in a ModuleList, are whole while a loop of a forward has them; one that is
    taken by index is whole until another is taken.
    """

    num_hidden = 1
    precision: Precision | torch.dtype | str | None = None
    use_checkpoint: bool | None = None
    _groups = False  # whether an element has no forward of its own

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        num_hidden: int = 1,
        sqrt: bool = False,
        precision: Precision | torch.dtype | str | None = None,
        use_checkpoint: bool | None = None,
    ) -> None:
        if num_hidden < 1:
            raise ConfigurationError("num_hidden must be at least 1.")
        super().__init__()
        self.num_hidden, self.precision, self.use_checkpoint = num_hidden, precision, use_checkpoint
        self.extend(modules)

    def append(self: ListT, module: nn.Module) -> ListT:
        """Add ``module`` as a Block."""
        return super().append(self._as_block(module))

    def insert(self, index: int, module: nn.Module) -> None:
        """Insert ``module`` as a Block."""
        super().insert(index, self._as_block(module))

    def extend(self: ListT, modules: Iterable[nn.Module]) -> ListT:
        """Add all ``modules`` as Blocks."""
        for module in modules:
            self.append(module)
        return self

    def __setitem__(self, index: int, module: nn.Module) -> None:
        super().__setitem__(index, self._as_block(module))

    def __iter__(self) -> Iterator[Any]:
        modules = super().__iter__()
        return self._one_by_one(modules) if self._groups else modules

    @staticmethod
    def _one_by_one(modules: Iterator[nn.Module]) -> Iterator[nn.Module]:
        """Groups of modules are never called themselves: each is whole while the loop has it."""
        for module in modules:
            unit = unit_of(module) if module is not None else None
            pin = engine().outside.pin_for_loop(unit) if unit is not None else None
            try:
                yield module
            finally:
                if pin is not None:
                    pin.release()

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        if isinstance(part, TransformerBlockList):
            part.num_hidden, part.precision = self.num_hidden, self.precision
            part.use_checkpoint = self.use_checkpoint
        elif self._groups and part is not None:
            unit = unit_of(part)
            if unit is not None:
                engine().outside.pin_until_next(self, unit)
        return part

    def __add__(self, other: Iterable[nn.Module]) -> Any:
        """A list of the elements of both, with the settings of this one."""
        both = self[:]
        both.extend(other)
        return both

    def _as_block(self, module: nn.Module) -> nn.Module:
        if module is None:  # as in nn.ModuleList, a place without a module
            return module
        self._groups |= type(module).forward is nn.Module.forward
        if isinstance(module, Block):
            return module
        return Block(module, use_checkpoint=self.use_checkpoint, precision=self.precision)

    def forward(self, *args: Any, return_hidden_states: bool = False, **kwargs: Any) -> Any:
        """Run all blocks.

        With ``return_hidden_states`` also give each hidden's inputs to every block, stacked: (L, ...).
        """
        count = self.num_hidden
        if len(args) < count:
            raise ConfigurationError(f"The list carries {count} hidden values; it got {len(args)} positional ones.")
        hidden, extra = args[:count], args[count:]
        inputs: list[list[Any]] = [[] for _ in range(count)]
        for block in self:
            if return_hidden_states:
                for seen, value in zip(inputs, hidden, strict=True):
                    seen.append(value)
            out = block(*hidden, *extra, **kwargs)
            hidden = (out,) if count == 1 else tuple(out)
            if len(hidden) != count:
                raise ConfigurationError(f"With num_hidden={count} a block returns {count} values, not {len(hidden)}.")
        if return_hidden_states:
            return (*hidden, *(torch.stack(seen) for seen in inputs))
        return hidden[0] if count == 1 else hidden
