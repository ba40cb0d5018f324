"""The parameter that user code holds: it shows its whole shape wherever its bytes are.

A DistributedParameter is an ordinary ``nn.Parameter`` until its module is sharded.  From then on it changes between
two states that differ only in what ``.data`` is:

whole    ``.data`` is a view of a gather buffer (or of the shard itself at world size 1); any operation works.
sharded  ``.data`` is a ShardedTensor, which acts on this rank's part.  Torch functions on the parameter itself are
         looked at one by one (``rules.py``): metadata passes, element-wise updates act on this rank's shard, what
         others need is gathered for them, and what Python alone reads (``item``) raises ShardedAccessError.  To torch
         the parameter is one NaN expanded to the whole shape, so that shape, dtype, device and ``requires_grad`` are
         right; torch's functions never see it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..autograd import backward_id, never_compiled, runs_as_written
from ..context import context
from ..errors import ConfigurationError, ShardedAccessError
from .place import Part, Place
from .published_facts import PublishedFacts
from .sharded_tensor import ShardedTensor
from .slices import Split

_MAKES_PARAMETERS = nn.Parameter.__new__.__code__
_raw_grad: Any = torch.Tensor.grad
_raw_data: Any = torch.Tensor.data
_requires_grad: Any = torch.Tensor.requires_grad


class Home(Protocol):
    """What a parameter asks of the flat shard that holds it.  Parameters are known to it by index."""

    @property
    def names(self) -> Sequence[str]:
        """Of all parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """In which values rest."""

    @property
    def is_whole(self) -> bool:
        """Whether the parameters show their values."""

    @property
    def moves(self) -> bool:
        """Whether ranks have parts, of which the whole is gathered."""

    @property
    def in_block(self) -> bool:
        """Whether a Block gathers it."""

    @property
    def is_stepped_on(self) -> bool:
        """Whether an optimizer's step is running, and the parameters show what it is to change."""

    def shape_of(self, index: int) -> tuple[int, ...]:
        """The whole shape."""

    def show_at_rest(self) -> None:
        """In a forward that has gathered it cast, show the values as they rest, if that can be done now."""

    def expose(self, shown: torch.Tensor | None = None) -> None:
        """User code holds ``shown``, ``p.data`` of a whole parameter, and may write to it unseen."""

    def place_of(self, index: int) -> Place:
        """Where this rank's part of a parameter is among all parts."""

    def read_part(self, index: int) -> torch.Tensor:
        """(n,) this rank's part of a parameter, not to be written."""

    def writing(self, index: int) -> AbstractContextManager[torch.Tensor]:
        """(n,) the same, which the body may change in place."""

    def write(self, index: int, whole: torch.Tensor) -> None:
        """``p.data = whole``."""

    def visible_grad(self, index: int) -> torch.Tensor | None:
        """What ``p.grad`` shows for a reduced gradient."""

    def set_grad(self, index: int, whole: torch.Tensor | None) -> None:
        """``p.grad = whole``, which may be a ShardedTensor."""

    def copy_unit(self, memo: dict[int, object]) -> None:
        """Copy the whole unit with all its parameters; ``memo`` maps the old ones to the new."""

    def note_hooks(self, index: int) -> None:
        """Parameter ``index`` has got hooks on its gradient."""


class ParameterInitializer:
    """An initialisation to run later on the whole parameter: ``func(parameter, *args, **kwargs)``."""

    def __init__(self, func: Callable[..., object], *args: object, **kwargs: object) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs

    def __call__(self, parameter: torch.Tensor) -> None:
        self.func(parameter, *self.args, **self.kwargs)


class DistributedParameter(PublishedFacts, nn.Parameter):
    """An ``nn.Parameter`` that its DistributedModule shards over all ranks.

    Args:
        data: the whole initial value; where ranks differ, sharding takes rank 0's.
        requires_grad: as for ``nn.Parameter``.
        init_method: run by ``bmt.init_parameters``.
        group: a name by which ``bmt.grouped_parameters`` groups.
        tp_mode: ``data`` is this rank's slice of a tensor-parallel layer's parameter.  ``init_method`` still gets the
            whole, and whole state dicts hold the whole.
        tp_split_dim: the dimension along which the whole is cut.
        tp_parts: the relative lengths of what follows each other along dimension 0, such as a layer's queries, keys and
            values: each rank has its share of every part.
    """

    _flat: Home | None
    _index: int
    _init_method: Callable[[torch.Tensor], object] | None
    _group: str | None
    _split: Split | None = None  # how a whole is cut, of which this is a slice
    _taken: list[weakref.ref[Any]]  # what ``data`` has given: Parts while sharded, tensors while whole

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = True,
        init_method: Callable[[torch.Tensor], object] | None = None,
        group: str | None = None,
        tp_mode: bool = False,
        tp_split_dim: int = -1,
        tp_parts: tuple[int, ...] = (1,),
    ) -> DistributedParameter:
        here = context()  # a clear error when init_distributed was forgotten
        made = _adopt(nn.Parameter.__new__(cls, data, requires_grad), init_method, group, tp_mode, tp_split_dim)
        if tp_mode and here.tensor_group.world_size > 1:
            made._split = Split(tp_split_dim % made.dim(), tp_parts)
            if len(tp_parts) > 1 and (made._split.dim or made.shape[0] % sum(tp_parts)):
                raise ConfigurationError(
                    "Parts of a tensor-parallel parameter follow each other along dimension 0, and each rank has an "
                    f"equal share of every one: {list(tp_parts)} are no parts of a slice of shape {tuple(made.shape)}."
                )
        return made

    @property
    def group(self) -> str | None:
        """Name of the parameter group it was made for."""
        return self._group

    @property
    @never_compiled
    def data(self) -> torch.Tensor:
        """The values while whole; a ShardedTensor while sharded.  What is written to it stays.

        What is assigned is copied; what was taken from here before keeps the old values, as in torch.
        """
        if self._flat is not None and not _is_torchs(sys._getframe(2)):
            self._flat.show_at_rest()
        if isinstance(self, ShardedParameter):
            return ShardedTensor(self._own_part())
        shown: torch.Tensor = _raw_data.__get__(self)
        if self._flat is not None and self._flat.is_whole:  # else an optimizer steps on this rank's part
            self._flat.expose(shown)
            self._taken = [taken for taken in self._taken if taken() is not None]
            self._taken.append(weakref.ref(shown))
        return shown

    @data.setter
    @never_compiled
    def data(self, value: torch.Tensor) -> None:
        if self._flat is None:
            _raw_data.__set__(self, value)
            return
        require_same(self, value)
        self._flat.show_at_rest()
        for taken in [one() for one in self._taken]:
            if isinstance(taken, Part):
                taken.leave_home()
            elif taken is not None:
                taken.data = taken.clone()
        self._taken = []
        self._flat.write(self._index, value)

    def set_(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Take other values, as ``p.data = values`` does, with which torch's parametrizations are removed."""
        if self._flat is None:
            return super().set_(*args, **kwargs)  # type: ignore[call-overload,no-any-return]
        match [*args, *kwargs.values()]:
            case [torch.Tensor() as values]:
                require_same(self, values)
                with torch.no_grad():
                    return self.copy_(values)
        raise ShardedAccessError(
            f"set_ of {self._flat.names[self._index]!r}, which the ranks have parts of, takes one tensor of its shape."
        )

    def module_load(self, other: torch.Tensor, assign: bool = False) -> torch.Tensor:
        """What torch swaps in where modules are told to swap: refused before any value is written."""
        self._refuse_swap()
        return super().module_load(other, assign)  # type: ignore[no-any-return,no-untyped-call]

    def _use_count(self) -> Any:
        """``torch.utils.swap_tensors`` alone asks for it, of both tensors before it swaps."""
        self._refuse_swap()
        return super()._use_count()  # type: ignore[misc]

    def _refuse_swap(self) -> None:
        if self._flat is not None:
            raise ShardedAccessError(
                f"Parameter {self._flat.names[self._index]!r} lies in memory that it shares with others, so that "
                "torch.utils.swap_tensors cannot give it another tensor's. On every rank, write the values: `with "
                "torch.no_grad(): parameter.copy_(values)`, or module.load_state_dict(values) with "
                "torch.__future__.set_swap_module_params_on_conversion(False)."
            )

    def _own_part(self) -> Part:
        for taken in self._taken:
            part = taken()
            if isinstance(part, Part):
                return part
        assert self._flat is not None
        part = Part(self._flat.place_of(self._index), home=_Values(self))
        self._taken = [weakref.ref(part)]
        return part

    @property
    @never_compiled
    def grad(self) -> torch.Tensor | None:
        """The gradient: whole while autograd holds it and at world size 1; a ShardedTensor once it is reduced.

        In fp32 for parameters in low precision.  None if no rank has one, which each rank knows by itself.  Until it is
        cleared or replaced it is what the optimizer steps on, writes included.
        """
        raw: torch.Tensor | None = _raw_grad.__get__(self)
        if raw is not None or self._flat is None:
            return raw
        if self._flat.is_stepped_on:
            return None  # no rank has a gradient for it, which an optimizer has to see
        return self._flat.visible_grad(self._index)

    @grad.setter
    @never_compiled
    def grad(self, value: torch.Tensor | None) -> None:
        flat = self._flat
        is_raw = backward_id() is not None and _raw_grad.__get__(self) is not None  # in a hook: not reduced yet
        if flat is None or is_raw or (value is not None and value.shape != self.shape):
            _raw_grad.__set__(self, value)
            return
        _raw_grad.__set__(self, None)
        flat.set_grad(self._index, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def register_hook(self, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> RemovableHandle:
        """As in torch; the hook gets this rank's gradient, before the mean over ranks."""
        handle: RemovableHandle = super().register_hook(hook)  # type: ignore[no-untyped-call]
        self._has_new_hook()
        return handle

    def register_post_accumulate_grad_hook(self, hook: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """The same."""
        handle: RemovableHandle = super().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._has_new_hook()
        return handle

    def _has_new_hook(self) -> None:
        if self._flat is not None and not torch.compiler.is_dynamo_compiling():
            self._flat.note_hooks(self._index)

    def detach(self) -> torch.Tensor:
        """As in torch, but for ``nn.Parameter(p)``, with which weight norm begins: that wants what ``p`` is."""
        if torch.compiler.is_dynamo_compiling() or sys._getframe(1).f_code is not _MAKES_PARAMETERS:
            return super().detach()
        if self._flat is None or not self._flat.moves:
            return like(self, _raw_data.__get__(self))
        raise ShardedAccessError(
            f"Another parameter cannot be made of {self._flat.names[self._index]!r}, of which every rank has a part, "
            "as weight_norm does. Change the layer before its model is sharded, or take "
            "nn.Parameter(parameter.gather())."
        )

    def gather(self) -> torch.Tensor:  # type: ignore[override]
        """The whole value, a copy that does not follow later updates; its gradient reaches the shards.  Collective."""
        if self._flat is None:
            return self.detach().clone()
        return cast(torch.Tensor, ShardedParameter.operation(DistributedParameter.gather, (self,), {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedParameter:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if self._flat is not None:
            self._flat.copy_unit(memo)  # copies every parameter of the unit, so that the copy is sharded alike
            if id(self) in memo:
                return memo[id(self)]  # type: ignore[no-any-return]
        made = like(self, self.detach().clone())
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._flat is not None and not self._flat.is_whole:
            raise ShardedAccessError(
                f"Parameter {self._flat.names[self._index]!r} is sharded and cannot be pickled. Save "
                "model.state_dict(), or use bmt.save(model, path)."
            )
        return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, {})


class _Values:
    """Where a parameter's values are, wherever it comes to lie."""

    is_gradient: ClassVar[bool] = False

    def __init__(self, parameter: DistributedParameter) -> None:
        self._parameter = parameter

    @property
    def _flat(self) -> Home:
        assert self._parameter._flat is not None
        return self._parameter._flat

    @property
    def place(self) -> Place:
        """Which part it is."""
        return self._flat.place_of(self._parameter._index)

    @property
    def dtype(self) -> torch.dtype:
        """In which it rests."""
        return self._flat.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return raw_data(self._parameter).device

    def read(self) -> torch.Tensor:
        """(n,) the present values, not to be written."""
        return self._flat.read_part(self._parameter._index)

    def writing(self) -> AbstractContextManager[torch.Tensor]:
        """(n,) the present values, which the body may change in place."""
        return self._flat.writing(self._parameter._index)


class ShardedParameter(DistributedParameter):
    """The same object while it is sharded.

    Attributes:
        operation: carries out a torch function that got at least one; ``rules``, which stands above, sets it.
    """

    operation: ClassVar[Callable[[Callable[..., object], tuple[object, ...], dict[str, object]], object]]

    @classmethod
    @runs_as_written
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return cls.operation(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> Any:
        """Never called, since the object was made by another class; that there is one keeps torch.compile away."""
        raise NotImplementedError(func)

    def __repr__(self) -> str:  # type: ignore[override]
        facts = f"shape={tuple(self.shape)}, dtype={self.dtype}, requires_grad={self.requires_grad}"
        return f"DistributedParameter({facts}, sharded)"


def _adopt(
    made: Any,
    init_method: Callable[[torch.Tensor], object] | None = None,
    group: str | None = None,
    tp_mode: bool = False,
    tp_split_dim: int = -1,
) -> DistributedParameter:
    made._flat, made._index = None, 0
    made._init_method, made._group, made._taken = init_method, group, []
    made._tp_mode, made._tp_split_dim = tp_mode, tp_split_dim
    return made  # type: ignore[no-any-return]


def like(old: DistributedParameter, data: torch.Tensor) -> DistributedParameter:
    """A parameter with ``data``, made as ``old`` was."""
    made: Any = nn.Parameter.__new__(DistributedParameter, data, old.requires_grad)
    _adopt(made, old._init_method, old._group, old._tp_mode, old._tp_split_dim)
    made._split = old._split
    return made  # type: ignore[no-any-return]


def _is_torchs(caller: FrameType) -> bool:
    """Whether torch itself asks, which runs compiled code with inputs as they were when it was made."""
    return str(caller.f_globals.get("__name__", "")).startswith("torch._")


def as_distributed(parameter: nn.Parameter) -> DistributedParameter:
    """Turn an ordinary parameter into a DistributedParameter in place, so that every reference to it follows."""
    if not isinstance(parameter, DistributedParameter):
        # The object's type changes, its identity does not: tied weights and optimizers keep pointing at it.
        parameter.__class__ = DistributedParameter
        _adopt(parameter)
    return parameter  # type: ignore[return-value]


def init_method_of(parameter: nn.Parameter) -> Callable[[torch.Tensor], object] | None:
    """The initialisation that ``parameter`` was made with, to be run later."""
    return parameter._init_method if isinstance(parameter, DistributedParameter) else None


def group_of(parameter: nn.Parameter) -> str | None:
    """Name of the parameter group it was made for."""
    return parameter._group if isinstance(parameter, DistributedParameter) else None


def split_of(parameter: nn.Parameter) -> Split | None:
    """How a whole is cut, of which ``parameter`` is this rank's slice; None if it is none."""
    return parameter._split if isinstance(parameter, DistributedParameter) else None


def raw_grad(parameter: nn.Parameter) -> torch.Tensor | None:
    """The gradient autograd has accumulated and nobody has taken yet."""
    return _raw_grad.__get__(parameter)  # type: ignore[no-any-return]


def raw_grads(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor | None]:
    """The same of many, without a call for each."""
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(_raw_grad.__get__, parameters))


def any_trains(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any requires grad."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(map(_requires_grad.__get__, parameters))


def set_raw_grad(parameter: nn.Parameter, value: torch.Tensor | None) -> None:
    """Replace autograd's own gradient field."""
    _raw_grad.__set__(parameter, value)


def raw_data(parameter: nn.Parameter) -> torch.Tensor:
    """What ``parameter`` shows now; taking it does not count as user code's doing."""
    return _raw_data.__get__(parameter)  # type: ignore[no-any-return]


def require_same(parameter: DistributedParameter, value: torch.Tensor) -> None:
    """Raise ShardedAccessError unless ``value`` may become ``parameter``'s data."""
    flat = parameter._flat
    assert flat is not None
    wanted = flat.shape_of(parameter._index)
    if tuple(value.shape) != wanted or value.dtype != flat.dtype:
        raise ShardedAccessError(
            f"Parameter {flat.names[parameter._index]!r} is {wanted} {flat.dtype}; its data cannot become "
            f"{tuple(value.shape)} {value.dtype}. Change dtypes with model.to(dtype), and shapes before the model is "
            "sharded, as resize_token_embeddings does."
        )


def follow_taken(parameter: DistributedParameter) -> None:
    """``parameter`` has come to lie elsewhere: so do tensors that ``data`` gave while it was whole."""
    for taken in [one() for one in parameter._taken]:
        if isinstance(taken, torch.Tensor):
            taken.data = raw_data(parameter)


def enter_whole(parameter: DistributedParameter, value: torch.Tensor) -> None:
    """Enter the whole state with ``value`` as data."""
    parameter.__class__ = DistributedParameter
    _raw_data.__set__(parameter, value)


def all_enter_whole(parameters: Iterable[DistributedParameter], values: Iterable[torch.Tensor]) -> None:
    """The same for many."""
    assign = _raw_data.__set__
    for parameter, value in zip(parameters, values, strict=True):
        parameter.__class__ = DistributedParameter
        assign(parameter, value)


def all_enter_sharded(parameters: Iterable[DistributedParameter], poisons: Iterable[torch.Tensor]) -> None:
    """Enter the sharded state."""
    assign = _raw_data.__set__
    for parameter, poison in zip(parameters, poisons, strict=True):
        parameter.__class__ = DistributedParameter
        assign(parameter, poison)
        parameter.__class__ = ShardedParameter


def make_poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One NaN (the least value for integers), expanded to ``shape``."""
    if dtype.is_floating_point or dtype.is_complex:
        value: float | int | bool = float("nan")
    else:
        value = True if dtype is torch.bool else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
