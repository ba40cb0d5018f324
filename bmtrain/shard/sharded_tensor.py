"""A tensor of which every rank keeps a part: what ``p.data`` and ``p.grad`` of a sharded parameter are.

Whatever is made from one element by element is one, too, with memory of its own: moving averages, momentum, masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..autograd import backward_id, runs_as_written
from ..errors import ShardedAccessError
from .place import Part, Place
from .slices import joined, own_slice

_Handler = Callable[..., Any]

_ELEMENTWISE = {"copy_", "fill_", "zero_", "masked_fill_", "floor_divide", "floor_divide_", "clone", "where"}
"""Beside what torch itself calls pointwise."""

_SAME_ORDER = {"view", "_unsafe_view", "unsqueeze", "squeeze", "detach", "alias", "_reshape_alias", "expand"}
"""Views whose elements follow each other as in the whole tensor."""

_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "_to_copy", "clone"}
_RANDOM = {
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_",
    "rand_like", "randn_like", "randint_like",
}  # fmt: skip
_OF_MEMORY = ("memory_format", "layout", "pin_memory")  # a part is 1-D


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
    """

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
            _refuse("requires_grad_", [self])
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
            _refuse(func.__name__, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)])
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
        name = func._schema.name.removeprefix("aten::")
        return _handler(name, func)(func, name, args, kwargs or {})


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


def _refuse(name: str, tensors: Sequence[ShardedTensor]) -> Any:
    names = ", ".join(repr(tensor.part.place.name) for tensor in tensors[:3])
    raise NeedsWholeError(
        f"{name} needs whole values of {names}, which are sharded over the ranks. On every rank, take "
        "tensor.full_tensor() of what you read, or do it inside `with bmt.gathered(module_or_parameter):` (with "
        "write=True to change it), where parameters are whole."
    )


def _sharded(tree: Any) -> list[ShardedTensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, ShardedTensor)]


# -- which function does what ----------------------------------------------------------------------------------------


@cache
def _handler(name: str, func: Any) -> _Handler:
    if name in _REDUCTIONS:
        return _reduce
    if name in _OTHERS:
        return _OTHERS[name]
    if name in _SAME_ORDER:
        return _view
    if name in _LIKE:
        return _like
    if name in _RANDOM:
        return _random
    if name.startswith("_foreach_"):
        return _foreach_reduce if name.removeprefix("_foreach_") in _REDUCTIONS else _foreach
    if name.startswith("new_"):
        return _new
    return _elementwise if name in _ELEMENTWISE or _is_pointwise(name, func) else _unknown


def _is_pointwise(name: str, func: Any) -> bool:
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    ops = [func]
    if name.endswith("_"):  # torch tags some functions without their in-place forms
        plain = getattr(torch.ops.aten, name[:-1], None)
        ops += [getattr(plain, overload) for overload in plain.overloads()] if plain is not None else []
    return any(torch.Tag.pointwise in op.tags for op in ops)


def _unknown(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Made of other functions, where autograd has not taken it apart already; or nothing for parts."""
    out = func.decompose(*args, **kwargs)
    return out if out is not NotImplemented else _refuse(name, _sharded((args, kwargs)))


def _view(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    shape = func(torch.empty(source.shape, device="meta"), *args[1:], **kwargs).shape
    if shape.numel() != source.numel():
        _refuse(name, [source])
    return ShardedTensor(source.part, shape)


def _like(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    options = {key: value for key, value in kwargs.items() if key not in _OF_MEMORY}
    return _own(source, func(source.part.read(), *args[1:], **options))


def _new(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    return func(torch.empty(0, dtype=source.dtype, device=source.device), *args[1:], **kwargs)


def _own(like: ShardedTensor, part: torch.Tensor) -> ShardedTensor:
    return ShardedTensor(Part(like.part.place, part), like.shape)


def _random(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = args[0]
    if not isinstance(target, ShardedTensor) or len(_sharded((args, kwargs))) > 1:
        return _unknown(func, name, args, kwargs)
    place = target.part.place
    is_slice = place.split is not None and target.shape == place.shape
    shape = place.whole_shape if is_slice else target.shape
    whole = func(torch.empty(shape, dtype=target.dtype, device=target.device), *args[1:], **kwargs)
    if is_slice:
        whole = own_slice(place.ctx, whole, place.split)
    whole = place.same_on_replicas(whole, f"{name} of {place.name!r}")
    if not name.endswith("_"):
        return _own(target, place.cut(whole).clone())
    _elementwise(torch.ops.aten.copy_.default, name, (target, whole), {})
    return target


# -- element by element ----------------------------------------------------------------------------------------------


def _elementwise(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    sharded = _sharded((args, kwargs))
    written = kwargs.get("out", args[0] if name.endswith("_") else None)
    mixed = backward_id() is not None and _differ_between_ranks((args, kwargs))
    if isinstance(written, ShardedTensor):
        if mixed:
            _refuse(f"{name} with a gradient that every rank has its own of,", [written])
    elif mixed or written is not None:  # an ordinary tensor takes whole values
        args, kwargs = whole_operands(args, kwargs)
        return func(*args, **kwargs)
    # The result lies where the largest operand does; memory of one's own moves sooner than a parameter's.
    leader = max(sharded, key=lambda t: (t.numel(), t.dim(), not t.part.is_own)) if written is None else written
    if written is None:
        out = func(*_operands(args, leader, name), **_operands(kwargs, leader, name))
        return tree_map(lambda x: _own(leader, x) if isinstance(x, torch.Tensor) else x, out)
    _note(name, leader)
    with leader.part.writing() as part:
        # Operands first: one that lies elsewhere is gathered.
        others = [part if x is leader else x for x in _operands(args, leader, name, skip=leader)]
        named = {k: part if x is leader else x for k, x in _operands(kwargs, leader, name, skip=leader).items()}
        func(*others, **named)
    return leader


def _differ_between_ranks(tree: Any) -> bool:
    """Whether there are ordinary tensors, of which each rank has its own: during a backward, gradients may be among."""
    return any(isinstance(leaf, torch.Tensor) and not isinstance(leaf, ShardedTensor) for leaf in tree_leaves(tree))


def _note(name: str, target: ShardedTensor) -> None:
    """Every rank changes its part now: who does it alone is found out at the next step of all."""
    place = target.part.place
    place.ctx.engine.comes_to(f"{name} of {place.name!r}")


def _operands(tree: Any, leader: ShardedTensor, name: str, skip: ShardedTensor | None = None) -> Any:
    return tree_map(lambda x: x if x is skip and skip is not None else _operand(x, leader, name), tree)


def _operand(value: Any, leader: ShardedTensor, name: str) -> Any:
    """This rank's part of ``value``, to stand beside that of ``leader``."""
    if not isinstance(value, torch.Tensor):
        return value
    place = leader.part.place
    what = f"{name} of {place.name!r}"
    if isinstance(value, ShardedTensor):
        if value.shape == leader.shape:
            return value.part.values_at(place, what)
        value = value.full_tensor()
    if not value.dim() and leader.dim():
        return value  # a number, for torch's rules of dtypes as well
    try:
        return place.cut(value.expand(leader.shape))
    except RuntimeError:
        raise NeedsWholeError(
            f"{name} of {place.name!r}, which is sharded, takes tensors of its shape {tuple(leader.shape)}, not of "
            f"{tuple(value.shape)}. Do it inside `with bmt.gathered(...)`, where parameters are whole."
        ) from None


def _foreach(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every position of the lists by itself; parts of one list stay together in one call."""
    lists = [a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)) and _holds_tensors(a)]
    in_place = name.endswith("_")
    leaders: list[ShardedTensor | None] = []
    backward = backward_id() is not None
    for column in zip(*lists, strict=True):
        sharded = [x for x in column if isinstance(x, ShardedTensor)]
        whole_target = in_place and not isinstance(column[0], ShardedTensor)
        if backward and sharded and not whole_target and _differ_between_ranks(column):
            _refuse(f"{name} with gradients that every rank has its own of,", sharded)
        leaders.append(None if whole_target or not sharded else column[0] if in_place else sharded[0])
    first = next((leader for leader in leaders if leader is not None), None)
    if in_place and first is not None:
        _note(name, first)
    with ExitStack() as stack:
        targets = [
            stack.enter_context(leader.part.writing()) if in_place and leader is not None else None
            for leader in leaders
        ]

        def operand(value: Any, index: int, is_target: bool) -> Any:
            leader, target = leaders[index], targets[index]
            if leader is None:
                return value.full_tensor() if isinstance(value, ShardedTensor) else value
            return target if is_target and target is not None else _operand(value, leader, name)

        def converted(value: Any) -> Any:
            if any(value is one for one in lists):
                return [operand(x, i, value is lists[0]) for i, x in enumerate(value)]
            return value

        out = func(*map(converted, args), **{k: converted(v) for k, v in kwargs.items()})
    if in_place:
        return None
    return [x if leader is None else _own(leader, x) for x, leader in zip(out, leaders, strict=True)]


def _holds_tensors(values: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


# -- all elements ----------------------------------------------------------------------------------------------------

_Partial = Callable[[torch.Tensor], torch.Tensor]


def _wide(values: torch.Tensor) -> torch.Tensor:
    """For sums: in fp32 at least."""
    low = values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if low else values


def _sum(values: torch.Tensor) -> torch.Tensor:
    return _wide(values).sum()


def _combined(
    tensors: Sequence[ShardedTensor],
    partial: _Partial,
    combine: _Partial,
    name: str,
) -> list[torch.Tensor]:
    """``combine`` of every rank's ``partial``, a 0-d tensor, for each of ``tensors``.  One collective for all.

    Another one where there are slices of tensor-parallel layers: like a gradient's norm, what comes out is the layer's.
    """
    facts = []
    for tensor in tensors:
        part = tensor.part.read()
        facts.append(partial(part if part.numel() else part.new_zeros(1)))
    kind = facts[0].dtype
    for fact in facts[1:]:
        kind = torch.promote_types(kind, fact.dtype)
    if kind.is_floating_point:
        kind = torch.float64
    place = tensors[0].part.place
    what = f"{name} of {place.name!r}"
    rows = place.rows(torch.stack([fact.to(kind) for fact in facts]), what)
    slices = rows[None]
    if any(_is_slice(tensor) for tensor in tensors):
        slices = place.rows_of_slices(rows, what)
    results = []
    for index, tensor in enumerate(tensors):
        every = slices if _is_slice(tensor) else rows[None]
        keepers = tensor.part.place.keepers
        own = every[:, keepers, index].flatten() if tensor.numel() else partial(tensor.part.read())[None]
        results.append(combine(own).to(tensor.device))
    return results


def _is_slice(tensor: ShardedTensor) -> bool:
    place = tensor.part.place
    return place.split is not None and place.ctx.tensor_group.world_size > 1


def _count(tensor: ShardedTensor) -> int:
    """How many elements there are, in all slices."""
    return tensor.numel() * (tensor.part.place.ctx.tensor_group.world_size if _is_slice(tensor) else 1)


def _require_all(source: ShardedTensor, name: str, dim: Any) -> None:
    if dim is None or dim == []:
        return
    dims = {d % max(source.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)}
    if len(dims) != source.dim() and source.dim():
        _refuse(f"{name} along dimension {dim}", [source])


def _moment(tensor: ShardedTensor, correction: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and mean."""
    count = _count(tensor)
    (total,) = _combined([tensor], lambda x: x.double().sum(), torch.sum, name)
    mean = total / count
    (squares,) = _combined([tensor], lambda x: (x.double() - mean).square().sum(), torch.sum, name)
    return squares / max(count - correction, 0), mean


def _norm_of(order: float) -> _Partial:
    return lambda x: torch.linalg.vector_norm(_wide(x), order)


def _joined_norm(order: float) -> _Partial:
    return torch.sum if order == 0 else lambda x: torch.linalg.vector_norm(x, order)


_REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "sum": (_sum, torch.sum),
    "nansum": (lambda x: _wide(x).nansum(), torch.sum),
    "mean": (_sum, torch.sum),
    "prod": (lambda x: _wide(x).prod(), torch.prod),
    "max": (torch.max, torch.max),
    "min": (torch.min, torch.min),
    "amax": (torch.amax, torch.amax),
    "amin": (torch.amin, torch.amin),
    "any": (torch.any, torch.any),
    "all": (torch.all, torch.all),
    "count_nonzero": (torch.count_nonzero, torch.sum),
    "linalg_vector_norm": (None, None),
    "norm": (None, None),
    "var": (None, None),
    "std": (None, None),
    "var_mean": (None, None),
    "std_mean": (None, None),
    "aminmax": (None, None),
}
"""What each rank makes of its part, and what all make of that."""


@cache
def _argument_names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _reduce(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(_argument_names(func), args, strict=False)) | kwargs
    source: Any = named.pop("self", None)
    if not isinstance(source, ShardedTensor) or "out" in named or "other" in named:
        return _unknown(func, name, args, kwargs)
    dim, keepdim = named.get("dim"), named.get("keepdim", False)
    _require_all(source, name, dim)
    if dim is not None and dim != [] and name in ("max", "min"):  # also where the element is
        _refuse(f"{name} along dimension {dim}", [source])
    shown = _result_kinds(func, source, args[1:], kwargs)
    if name in ("var", "std", "var_mean", "std_mean"):
        correction = named.get("correction", 1 if named.get("unbiased", True) else 0)
        variance, mean = _moment(source, 1 if correction is None else correction, name)
        results = [variance.sqrt() if name.startswith("std") else variance, mean]
    elif name == "aminmax":
        results = [*_combined([source], torch.min, torch.min, name), *_combined([source], torch.max, torch.max, name)]
    elif name in ("linalg_vector_norm", "norm"):
        order = float(named.get("ord", named.get("p", 2)) if named.get("ord", named.get("p", 2)) is not None else 2)
        results = _combined([source], _norm_of(order), _joined_norm(order), name)
    else:
        partial, combine = _REDUCTIONS[name]
        dtype = named.get("dtype")
        cast = partial if dtype is None else lambda x: partial(x.to(dtype))
        results = _combined([source], cast, combine, name)
        if name == "mean":
            results = [results[0] / _count(source)]
    made = [value.to(kind) for value, kind in zip(results, shown, strict=False)]
    if keepdim:
        made = [value.reshape((1,) * source.dim()) for value in made]
    return made[0] if len(shown) == 1 else tuple(made)


def _result_kinds(func: Any, source: ShardedTensor, args: Any, kwargs: Any) -> list[torch.dtype]:
    """Dtypes of what ``func`` gives; torch's own errors for arguments that do not fit."""
    out = func(torch.empty(source.shape, dtype=source.dtype, device="meta"), *args, **kwargs)
    return [x.dtype for x in ([out] if isinstance(out, torch.Tensor) else out)]


def _foreach_reduce(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(args[0])
    sharded = [tensor for tensor in tensors if isinstance(tensor, ShardedTensor)]
    named = dict(zip(_argument_names(func), args, strict=False)) | kwargs
    dtype = named.get("dtype")
    if name == "_foreach_norm":
        order = float(named.get("ord", 2))
        results = _combined(sharded, _norm_of(order), _joined_norm(order), name)
    elif name == "_foreach_max":
        results = _combined(sharded, torch.max, torch.max, name)
    else:
        return _unknown(func, name, args, kwargs)
    given = iter([value.to(dtype or tensor.dtype) for value, tensor in zip(results, sharded, strict=True)])
    return [next(given) if isinstance(x, ShardedTensor) else func([x], *args[1:], **kwargs)[0] for x in tensors]


def _dot(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leader = next(iter(_sharded(args)))
    first, second = (_operand(x, leader, name) for x in args)
    if not first.numel():
        first, second = first.new_zeros(1), second.new_zeros(1)
    product = first.conj() * second if name == "vdot" else first * second
    holder = _own(leader, product)
    (total,) = _combined([holder], _sum, torch.sum, name)
    return total.to(leader.dtype)


def _equal(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first, second = args
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(torch.eq(first, second).all())


def _allclose(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(torch.isclose(*args, **kwargs).all())


def _dist(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.linalg.vector_norm(args[0] - args[1], *args[2:], **kwargs)


def _item(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of a tensor with one element."""
    place = args[0].part.place
    value = place.join(args[0].part.read(), f"item of {place.name!r}").item()
    return bool(value) if name == "is_nonzero" else value


_OTHERS: dict[str, _Handler] = {
    "dot": _dot, "vdot": _dot, "equal": _equal, "allclose": _allclose, "dist": _dist, "_local_scalar_dense": _item,
    "is_nonzero": _item,
}  # fmt: skip
