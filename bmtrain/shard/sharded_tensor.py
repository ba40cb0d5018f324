"""A tensor of which every rank keeps a part: what ``p.data`` and ``p.grad`` of a sharded parameter are.

Whatever is made from one element by element is one, too, with memory of its own: moving averages, momentum, masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..autograd import runs_as_written
from ..errors import ShardedAccessError
from .place import Part, Place
from .slices import joined, own_slice


class NeedsWholeError(ShardedAccessError):
    """Nothing was done: what was asked needs elements that other ranks keep."""


class ShardedTensor(torch.Tensor):
    """Shows the whole shape; its memory is this rank's part, 1-D.

    Element-wise functions act on the parts, in place or not: other operands are ShardedTensors, numbers, or ordinary
    tensors of the whole shape, the same on all ranks, of which each rank takes its part.  Random ones draw the whole
    tensor on every rank and keep a part: the numbers are those of one process.  Reductions of all elements (``sum``,
    ``norm``, ``max``, ``any``...) and ``full_tensor`` are collective; so is an ordinary tensor's change by a
    ShardedTensor in place.  Under autograd an operand beside tensors that require grad is gathered.  Everything else
    raises ShardedAccessError.

    ``p.data`` and ``p.grad`` write through to the parameter and its gradient until these are replaced or cleared; from
    then on what was taken before keeps the values of then.

    Attributes:
        operation: carries out a torch function that got at least one; ``sharded_functions``, which stands above, sets
            it.
    """

    operation: ClassVar[Callable[[Callable[..., object], tuple[object, ...], dict[str, object]], object]]
    _part: Part

    @staticmethod
    def __new__(cls, part: Part, shape: Sequence[int] | None = None) -> ShardedTensor:
        size = part.place.shape if shape is None else shape
        made: ShardedTensor = torch.Tensor._make_wrapper_subclass(cls, size, dtype=part.dtype, device=part.device)
        made._part = part
        return made

    @property
    def part(self) -> Part:
        """Where this rank's elements are."""
        return self._part

    def full_tensor(self) -> torch.Tensor:
        """The whole values, an ordinary tensor that does not follow later changes.  Collective."""
        part = self._part
        return part.place.join(part.read(), f"full_tensor of {part.place.name!r}").view(self.shape)

    def gather(self) -> torch.Tensor:  # type: ignore[override]
        """The same, under the name that it has for parameters."""
        return self.full_tensor()

    @property
    def data(self) -> torch.Tensor:
        """The same elements.  What is assigned is copied: into ``p.grad`` and what others keep, else to new memory."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        place, what = self._part.place, f"assignment to {self._part.place.name!r}"
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ShardedAccessError(
                f"The {what} needs {tuple(self.shape)} {self.dtype}, not {tuple(value.shape)} {value.dtype}."
            )
        if self._part.is_gradient or self._part.is_kept:
            self.copy_(value)
        elif value.device != self.device:
            raise ShardedAccessError(f"The {what} needs a tensor on {self.device}, not on {value.device}.")
        else:
            self._part = Part(place, part_of(value, place, what).clone())

    @property
    def requires_grad(self) -> bool:
        """False: no graph leads to parts."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> ShardedTensor:
        """Raises ShardedAccessError for True."""
        if requires_grad:
            refuse("requires_grad_", [self])
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        facts = f"{self._part.place.name!r}, shape={tuple(self.shape)}, dtype={self.dtype}"
        return f"ShardedTensor({facts}, device='{self.device}')"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and self.numel() == 1 else repr(self)

    def __copy__(self) -> ShardedTensor:
        return ShardedTensor(self._part, self.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedTensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ShardedAccessError(
            f"A ShardedTensor made from {self._part.place.name!r} cannot be pickled: this rank has a part of it only. "
            "On every rank, write it with bmt.save_checkpoint(obj, path), or take tensor.full_tensor() first."
        )

    @classmethod
    @runs_as_written
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MEMORY:
            refuse(func.__name__, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)])
        if any(other is not cls for other in types):
            return NotImplemented  # a sharded parameter knows better
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_grad_enabled() and func not in TAKE_KIND and _require_grad((args, kwargs)):
                target = next(iter((*args, *kwargs.values())), None)
                if isinstance(target, cls) and is_in_place(getattr(func, "__name__", "")):
                    with torch.no_grad():  # no graph leads to parts, and what is written must stay
                        return func(*args, **kwargs)
                args, kwargs = whole_operands(args, kwargs)
            return func(*args, **kwargs)

    @classmethod
    @runs_as_written
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return cls.operation(func, args, kwargs or {})


_T = torch.Tensor
_MEMORY = {
    _T.numpy, _T.tolist, _T.data_ptr, _T.untyped_storage, _T.storage, _T.__array__, _T.share_memory_, _T.__dlpack__,
    _T.apply_, _T.map_, _T.set_, _T.resize_,
}  # fmt: skip


TAKE_KIND = {_T.to, _T.type_as, _T.view_as, _T.expand_as, _T.reshape_as}
"""Of their second argument they need no values."""


def is_in_place(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def written_by(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a function of this name writes to."""
    targets = [kwargs.get("out")]
    if is_in_place(name):
        targets.append(next(iter((*args, *kwargs.values())), None))  # torch.nn.init's functions pass all by name
    return tree_leaves(targets)


_IN_PLACE = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__",
    "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


def part_of(value: torch.Tensor, place: Place, what: str) -> torch.Tensor:
    """(n,) this rank's part, as ``place`` lays it, of a tensor of the whole shape.

    Collective if ``value`` is a ShardedTensor that lies elsewhere.
    """
    return value.part.values_at(place, what) if isinstance(value, ShardedTensor) else place.cut(value)


def unsliced(tensor: ShardedTensor) -> torch.Tensor:
    """``tensor.full_tensor()``; of slices of tensor-parallel layers the whole.  Collective.

    Raises ShardedAccessError for a view of a slice that has another shape.
    """
    place = tensor.part.place
    if place.split is not None and tensor.shape != place.shape:
        raise ShardedAccessError(
            f"A tensor of shape {tuple(tensor.shape)} was made of {place.name!r}, of which tensor-parallel ranks have "
            f"slices of shape {tuple(place.shape)}: give it this shape, so that the slices can be put together."
        )
    return joined(place.ctx, tensor.full_tensor(), place.split)


def slice_for(tensor: ShardedTensor, whole: torch.Tensor) -> torch.Tensor:
    """What ``tensor`` has of ``whole``, which is as ``unsliced`` gives it; any other tensor as it is."""
    place = tensor.part.place
    return own_slice(place.ctx, whole, place.split if tuple(whole.shape) == place.whole_shape else None)


def whole_operands(args: Any, kwargs: Any) -> Any:
    """``args`` and ``kwargs`` with every ShardedTensor gathered.  Collective if there are any."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, ShardedTensor) else x, (args, kwargs))


def _require_grad(tree: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(tree))


def refuse(name: str, tensors: Sequence[ShardedTensor]) -> NoReturn:
    """Raises NeedsWholeError: function ``name`` cannot be done on ``tensors``."""
    names = ", ".join(repr(tensor.part.place.name) for tensor in tensors[:3])
    raise NeedsWholeError(
        f"{name} needs whole values of {names}, which are sharded over the ranks. On every rank, take "
        "tensor.full_tensor() of what you read, or do it inside `with bmt.gathered(module_or_parameter):` (with "
        "write=True to change it), where parameters are whole."
    )
