"""What torch functions do on ShardedTensors: part by part, or as one number of all parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..autograd import backward_id
from .place import Part
from .sharded_tensor import NeedsWholeError, ShardedTensor, refuse, whole_operands
from .slices import own_slice

_Handler = Callable[..., Any]

_ELEMENTWISE = {"copy_", "zero_", "floor_divide", "floor_divide_", "clone", "where"}
"""Beside what torch itself calls pointwise."""

_SAME_ORDER = {"view", "_unsafe_view", "unsqueeze", "squeeze", "detach", "alias", "_reshape_alias", "expand"}
"""Views whose elements follow each other as in the whole tensor."""

_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "_to_copy", "clone"}
_RANDOM = {
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_",
    "rand_like", "randn_like", "randint_like",
}  # fmt: skip
_OF_MEMORY = ("memory_format", "layout", "pin_memory")  # a part is 1-D


def on_sharded_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out ``func``, of which at least one argument is a ShardedTensor."""
    name = func._schema.name.removeprefix("aten::")
    return _handler(name, func)(func, name, args, kwargs)


def _sharded(tree: Any) -> list[ShardedTensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, ShardedTensor)]


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
    return out if out is not NotImplemented else refuse(name, _sharded((args, kwargs)))


def _view(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    seen = func(torch.empty(source.shape, dtype=source.dtype, device="meta"), *args[1:], **kwargs)
    if seen.dtype != source.dtype or seen.numel() != source.numel():
        refuse(name, [source])
    return ShardedTensor(source.part, seen.shape)


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
            refuse(f"{name} with a gradient that every rank has its own of,", [written])
    elif mixed or written is not None:  # an ordinary tensor takes whole values
        args, kwargs = whole_operands(args, kwargs)
        return func(*args, **kwargs)
    # The result lies where the largest operand does; memory of one's own moves sooner than a parameter's.
    leader = max(sharded, key=_leads) if written is None else written
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


def _leads(tensor: ShardedTensor) -> tuple[Any, ...]:
    return tensor.numel(), tensor.dim(), tensor.device.type != "cpu", not tensor.part.is_own


def _fill(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The last argument is one number for all elements."""
    *others, value = args
    if backward_id() is not None or not isinstance(value, torch.Tensor) or not _sharded(others):
        return _elementwise(func, name, args, kwargs)
    number = value.full_tensor() if isinstance(value, ShardedTensor) else value
    return _elementwise(lambda *rest: func(*rest, number), name, tuple(others), kwargs)


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
            return _beside(value.part.values_at(place, what), leader)
        value = value.full_tensor()
    if not value.dim() and leader.dim():
        return value  # a number, for torch's rules of dtypes as well
    try:
        return _beside(place.cut(value.expand(leader.shape)), leader)
    except RuntimeError:
        raise NeedsWholeError(
            f"{name} of {place.name!r}, which is sharded, takes tensors of its shape {tuple(leader.shape)}, not of "
            f"{tuple(value.shape)}. Do it inside `with bmt.gathered(...)`, where parameters are whole."
        ) from None


def _beside(part: torch.Tensor, leader: ShardedTensor) -> torch.Tensor:
    """A number on the CPU may stand beside one on any device, as in torch, though both are 1-D here."""
    return part.to(leader.device) if not leader.dim() and part.device.type == "cpu" else part


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
            refuse(f"{name} with gradients that every rank has its own of,", sharded)
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
        refuse(f"{name} along dimension {dim}", [source])


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
        refuse(f"{name} along dimension {dim}", [source])
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


def _unscale(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What GradScaler does with gradients: all ranks leave the step out if the gradient of one is not finite."""
    grads, found, inverse = args
    sharded = _sharded(grads)
    bad = _combined(sharded, lambda part: (~part.isfinite()).any().float(), torch.max, name)
    own = [(~grad.isfinite()).any().float() for grad in grads if not isinstance(grad, ShardedTensor)]
    found.copy_(torch.stack([found.max(), *(value.to(found.device) for value in (*bad, *own))]).max())
    _foreach(torch.ops.aten._foreach_mul_.Tensor, "_foreach_mul_", (grads, inverse), {})


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
    "fill": _fill, "fill_": _fill, "masked_fill": _fill, "masked_fill_": _fill,
    "dot": _dot, "vdot": _dot, "equal": _equal, "allclose": _allclose, "dist": _dist, "_local_scalar_dense": _item,
    "is_nonzero": _item, "_amp_foreach_non_finite_check_and_unscale_": _unscale,
}  # fmt: skip

ShardedTensor.operation = staticmethod(on_sharded_tensors)
