"""Whole copies in a state dict.  For torch they would be the parameters themselves, so writes to them go there, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ShardedAccessError
from ..log import warn
from .engine import engine
from .flat import place_of
from .gathered import keep_rank_0s
from .parameter import DistributedParameter
from .sharded_tensor import ShardedTensor, slice_for, unsliced, written_by

T = TypeVar("T")
_T = torch.Tensor

_NO_WRITES = {"requires_grad_", "share_memory_", "detach_", "rename_"}
_REPLACE_ALL = {"copy_", "zero_", "fill_", "normal_", "uniform_", "zeros_", "ones_", "constant_"}


_ABOUT = {
    "__get__", "size", "dim", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "untyped_storage", "data_ptr", "get_device", "type", "__len__", "__hash__",
}  # fmt: skip
"""What tells of a tensor, but no values."""


class Original(Protocol):
    """What a copy was taken of.

    Attributes:
        owner: whose state dict it is in.
    """

    owner: str

    def has_moved(self, copy: torch.Tensor) -> bool:
        """Whether it may have other values now than when ``copy`` was last made the same."""

    def read(self, copy: torch.Tensor) -> None:
        """Give ``copy`` the present values."""

    def write(self, copy: torch.Tensor) -> None:
        """Take the values of ``copy``."""


class StateTensor(torch.Tensor):
    """A whole tensor on the CPU.  In-place writes to it or a view of it are written to the model as well.

    It shows the values of when it was taken, and says so if it is read when the model has moved on; before it is
    written in part, it follows the model.  What is computed from it, copies and files are ordinary tensors.
    """

    _copy: torch.Tensor
    _original: Original

    @classmethod
    def of(cls, copy: torch.Tensor, original: Original) -> StateTensor:
        """``copy``, a tensor of its own memory, linked to ``original``."""
        return _linked(copy, copy, original)

    def was_loaded_into(self, target: object) -> None:
        """``target`` has these values now: if it is what this was taken of, they are the present ones again."""
        is_all = self.shape == self._copy.shape and self.stride() == self._copy.stride()
        if isinstance(self._original, OfParameter | OfBuffer) and is_all:
            self._original.is_same(target)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            _say_if_moved([self])
            memo[id(self)] = _plain(self).clone()
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _say_if_moved([self])
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array: writes to it would reach nobody."""
        _say_if_moved([self])
        array = _plain(self).numpy(force=force)
        array.flags.writeable = False
        return array

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        written = _written(name, args, kwargs)
        if isinstance(kwargs.get("out"), cls):  # which lies on the CPU, whatever device is the default
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        copies = {id(target._copy): target for target in written}
        if not (name in _REPLACE_ALL and all(t.numel() == t._copy.numel() for t in written)):
            for target in copies.values():
                target._original.read(target._copy)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        if name not in _ABOUT:
            _say_if_moved(source for source in sources if id(source._copy) not in copies)
        if all(issubclass(cls, other) for other in types):
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
        else:  # beside a sharded tensor, which knows better
            plain, named = tree_map(lambda x: _plain(x) if isinstance(x, cls) else x, (args, kwargs))
            out = func(*plain, **named)
        for target in copies.values():
            target._original.write(target._copy)
        if written:
            return out
        return tree_map(lambda x: _followed(x, sources) if type(x) is _T else x, out)


def without_links(value: T) -> T:
    """The tree ``value``, whose StateTensors are ordinary tensors, copied."""
    made: T = tree_map(lambda leaf: leaf.__deepcopy__({}) if isinstance(leaf, StateTensor) else leaf, value)
    return made


def _plain(tensor: StateTensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _say_if_moved(read: Iterable[StateTensor]) -> None:
    moved = next((tensor for tensor in read if tensor._original.has_moved(tensor._copy)), None)
    if moved is not None:
        owner = moved._original.owner
        warn(
            f"A state dict that was taken before the {owner}'s values changed is read: it holds the values of then, "
            f"where torch's would show those of now. For these, take it anew ({owner}.state_dict()); to keep those of "
            f"then and say so, copy.deepcopy({owner}.state_dict()).",
            stacklevel=4,
        )


def _linked(view: torch.Tensor, copy: torch.Tensor, original: Original) -> StateTensor:
    made = view.as_subclass(StateTensor)
    made._copy, made._original = copy, original
    return made


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[StateTensor]:
    targets = [] if name in _NO_WRITES else written_by(name, args, kwargs)
    return [target for target in targets if isinstance(target, StateTensor)]


def _followed(out: torch.Tensor, sources: list[StateTensor]) -> torch.Tensor:
    """A view of one of ``sources`` is linked, too."""
    if out.layout != torch.strided or not out.numel():
        return out
    for source in sources:
        if out.untyped_storage().data_ptr() == source._copy.untyped_storage().data_ptr():
            return _linked(out, source._copy, source._original)
    return out


class OfParameter:
    """All ranks write the same to a parameter's copy; where they do not, rank 0's values are kept, with a warning."""

    owner = "model"

    def __init__(self, parameter: DistributedParameter) -> None:
        self._parameter = parameter
        self._seen = self._version()

    def _version(self) -> int:
        flat, index = place_of(self._parameter)
        return flat.version_of(index)

    def has_moved(self, copy: torch.Tensor) -> bool:
        """Whether it may have other values now than when ``copy`` was last made the same."""
        if self._version() != self._seen:
            return True
        flat, index = place_of(self._parameter)
        return flat.may_be_written and flat.was_written(index, copy)

    def is_same(self, parameter: object) -> None:
        """``parameter`` and the copy have the same values."""
        if parameter is self._parameter:
            self._seen = self._version()

    @property
    def index(self) -> int:
        """The parameter's place in its flat shard."""
        return self._parameter._index

    def read(self, copy: torch.Tensor) -> None:
        """Give ``copy`` the present values.  Collective."""
        flat, index = place_of(self._parameter)
        copy.copy_(flat.joined(index, self._parameter.gather().detach()))
        self._seen = self._version()

    def write(self, copy: torch.Tensor) -> None:
        """Take the values of ``copy``.  Collective."""
        flat, index = place_of(self._parameter)
        what = f"the write into the state dict's copy of {flat.names[index]!r}"
        engine().meet(what)
        keep_rank_0s(flat.unit.ctx, what, {flat.names[index]: copy})
        flat.write(index, flat.own_slice(index, copy))
        self._seen = self._version()


class OfBuffer:
    """A buffer that lies on a device, or in parts."""

    owner = "model"

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._seen = buffer._version

    def has_moved(self, copy: torch.Tensor) -> bool:
        """Whether it may have other values now than when ``copy`` was last made the same."""
        return self._buffer._version != self._seen

    def is_same(self, buffer: object) -> None:
        """``buffer`` and the copy have the same values."""
        if isinstance(buffer, torch.Tensor) and _are_same(buffer, self._buffer):
            self._seen = self._buffer._version

    def read(self, copy: torch.Tensor) -> None:
        """Give ``copy`` the present values."""
        copy.copy_(unsliced(self._buffer) if isinstance(self._buffer, ShardedTensor) else self._buffer)
        self._seen = self._buffer._version

    def write(self, copy: torch.Tensor) -> None:
        """Take the values of ``copy``."""
        if isinstance(self._buffer, ShardedTensor):
            copy = slice_for(self._buffer, copy)
        with torch.no_grad():
            self._buffer.copy_(copy)
        self._seen = self._buffer._version


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are one buffer: torch's state dicts have detached ones."""
    if isinstance(one, ShardedTensor) or isinstance(other, ShardedTensor):
        return isinstance(one, ShardedTensor) and isinstance(other, ShardedTensor) and one.part is other.part
    if one.layout is not torch.strided or one.shape != other.shape or one.stride() != other.stride():
        return False
    return one.data_ptr() == other.data_ptr()


class OfNothing:
    """What a hook of the model's has made of parameters."""

    owner = "model"

    def has_moved(self, copy: torch.Tensor) -> bool:
        """Nobody knows."""
        return False

    def read(self, copy: torch.Tensor) -> None:
        """Raises ShardedAccessError."""
        raise ShardedAccessError(
            "This tensor of a state dict is a copy of part of a parameter, and a write to it would be lost. Give the "
            "changed state dict to model.load_state_dict, or change parameters inside `with bmt.gathered(model, "
            "write=True):`."
        )

    write = read
