"""What scripts written for the published library ask of a block, where the module has nothing of that name.

There a block was an object around the module, with methods of its own; here the block is the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import nn

from ..context import context
from ..errors import ConfigurationError, UnsupportedError
from ..shard.engine import engine
from ..shard.flat import FlatShard
from ..shard.gathered import grouped_parameters, init_parameters
from ..shard.parameter import group_of
from .record import unit_of

T = TypeVar("T")


class _IfAbsent(Generic[T]):
    """A method, or the value of one that takes nothing, unless the module has a child or parameter of its name."""

    def __init__(self, method: Callable[..., T], is_value: bool = False) -> None:
        self._method, self._is_value = method, is_value
        self.__doc__ = method.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        try:
            return module.__getattr__(self._name)
        except AttributeError:
            return self._method(module) if self._is_value else self._method.__get__(module)


def _method(method: Callable[..., T]) -> _IfAbsent[T]:
    return _IfAbsent(method)


def _value(method: Callable[..., T]) -> _IfAbsent[T]:
    return _IfAbsent(method, is_value=True)


class PublishedBlock:
    """The last base of every Block's class, so that whatever the module's own class defines comes first."""

    __slots__ = ()

    @_value
    def _module(self: Any) -> Any:
        """The module inside the block, which is the block."""
        return self

    @_method
    def grouped_parameters(self: Any) -> Iterator[tuple[str | None, list[nn.Parameter]]]:
        """As ``bmt.grouped_parameters``: pairs of a group's name and its parameters."""
        return grouped_parameters(self)

    @_method
    def init_parameters(self: Any) -> None:
        """As ``bmt.init_parameters``.  Collective."""
        init_parameters(self)

    @_method
    def release(self: Any, flag: object = None) -> None:
        """Give up whole values that were to stay for a use to come; whoever needs them gathers them again."""
        unit = unit_of(self)
        if unit is not None:
            engine().outside.release([unit])

    @_value
    def _storage_params(self: Any) -> dict[str, nn.Parameter]:
        """This rank's part of each flat buffer, 1-D, with its reduced gradient.  To be read.  Collective."""
        engine().finish_backward()
        return {name: _shown(flat) for name, flat in _flats(self)}

    @_value
    def _storage_info(self: Any) -> dict[str, dict[str, Any]]:
        """Of each flat buffer: its elements, those of a part, and which of all are this rank's part."""
        return {name: _flat_facts(flat) for name, flat in _flats(self)}

    @_value
    def _param_info(self: Any) -> list[dict[str, Any]]:
        """Of each parameter: which buffer it lies in, where, and which part of it (``begin``, ``end``) is here."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [fact for buffer, flat in _flats(self) for fact in _param_facts(buffer, flat, names)]

    @_method
    def set_pre_module(self, *modules: object) -> NoReturn:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "Blocks are not chained: the order in which they run is observed, and the next one is gathered ahead. "
            "Leave set_pre_module out."
        )

    @_method
    def pre_module(self) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse_neighbours()

    @_method
    def next_module(self) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse_neighbours()

    @_method
    def release_next_module(self, *flags: object) -> NoReturn:
        """Raises UnsupportedError."""
        raise UnsupportedError("Blocks are not chained. Call release() on the block whose values are to go.")

    @_method
    def reference(self, block: object) -> NoReturn:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "One block may run several times in a forward: use it itself in both places, as in "
            "bmt.TransformerBlockList([block, block])."
        )

    @_method
    def pre_hook(self, *args: object) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse_hooks()

    @_method
    def post_hook(self, *args: object) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse_hooks()


def _refuse_neighbours() -> NoReturn:
    raise UnsupportedError(
        "Blocks are not chained. Take a block's neighbours from the list it is in: layers[i - 1], layers[i + 1]."
    )


def _refuse_hooks() -> NoReturn:
    raise UnsupportedError(
        "A block gathers and releases around its own forward. Call the block, block(*args), or use its parameters "
        "inside `with bmt.gathered(block):`."
    )


def _flats(block: nn.Module) -> list[tuple[str, FlatShard]]:
    unit = unit_of(block)
    if unit is None:
        raise ConfigurationError(f"{type(block).__name__} is not sharded yet: its model is still being built.")
    return [(f"{str(f.dtype).removeprefix('torch.')}_{n}", f) for n, f in enumerate(unit.flats)]


def _shown(flat: FlatShard) -> nn.Parameter:
    made = nn.Parameter(flat.shard, requires_grad=flat.trainable)
    if flat.gradient.present:
        made.grad = flat.gradient.settled().to(flat.dtype)
    return made


def _flat_facts(flat: FlatShard) -> dict[str, Any]:
    rank = context().shard_rank
    begin, end = flat.layout.shard_range(rank)
    return {
        "total": flat.layout.numel, "partition_size": flat.layout.numel_on(rank), "begin": begin, "end": end,
        "dtype": flat.dtype, "requires_grad": flat.trainable, "zero_comm": context().world,
    }  # fmt: skip


def _param_facts(buffer: str, flat: FlatShard, names: dict[int, str]) -> Iterator[dict[str, Any]]:
    for index, (parameter, slot) in enumerate(zip(flat.params, flat.layout.slots, strict=True)):
        kept = flat.layout.local(index, context().shard_rank).whole
        yield {
            "parameter": parameter, "name": names[id(parameter)], "kw_name": buffer, "shape": torch.Size(slot.shape),
            "size": slot.numel, "offset": slot.start, "begin": kept.start, "end": kept.stop,
            "group": group_of(parameter), "requires_grad": parameter.requires_grad,
        }  # fmt: skip
