"""What torch functions do on a parameter while it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..autograd import is_for_edge
from ..errors import ShardedAccessError
from ..users_code import calling_frame
from .chosen_gradients import backward, gradients
from .engine import engine
from .flat import place_of
from .gathered import gathered, keep_rank_0s
from .on_parts import on_parts
from .parameter import DistributedParameter, ShardedParameter, raw_data
from .sharded_tensor import written_by
from .unit import unit_of_flat
from .view import ViewOfSharded

_T = torch.Tensor

_ATTRIBUTES = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "names", "output_nr", "retains_grad", "_version",
    "is_mps", "_backward_hooks", "_grad_fn", "_base", "is_xpu", "is_mkldnn", "is_sparse_csr", "is_vulkan", "is_ipu",
    "is_xla", "is_maia", "_post_accumulate_grad_hooks", "volatile", "name", "data", "grad", "_grad", "grad_dtype",
}  # fmt: skip
"""Attributes that a parameter answers without its values."""

_METHODS = {
    _T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.is_floating_point,
    _T.is_complex, _T.__len__, _T.__hash__, _T.requires_grad_, _T.get_device, _T.register_hook,
    _T.is_signed, _T.register_post_accumulate_grad_hook, _T.storage_offset, _T.is_set_to, _T.new,
    _T.untyped_storage,
    _T.data_ptr, _T.__repr__, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_same_size,
    _T.is_inference, _T.is_shared, _T.new_zeros, _T.new_ones, _T.new_empty, _T.new_full, _T.new_tensor,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
}  # fmt: skip

_ELEMENTWISE = {
    _T.copy_, _T.zero_, _T.fill_, _T.add_, _T.sub_, _T.mul_, _T.div_, _T.neg_, _T.lerp_, _T.clamp_, _T.clamp_min_,
    _T.clamp_max_, _T.addcmul_, _T.addcdiv_, _T.sign_, _T.abs_, _T.sqrt_, _T.pow_, _T.__iadd__, _T.__isub__,
    _T.__imul__, _T.__itruediv__,
}  # fmt: skip
"""In-place functions whose every output element depends on the same element of the inputs only."""

_FILLS = {
    _T.normal_, _T.uniform_, _T.random_, _T.bernoulli_, _T.exponential_, _T.geometric_, _T.cauchy_, _T.log_normal_,
    nn.init.normal_, nn.init.uniform_, nn.init.constant_, nn.init.kaiming_uniform_,
}  # fmt: skip
"""In-place functions that need no values.  They draw the whole tensor, as for a model that is not sharded."""

_TO_HOST = {
    _T.item, _T.tolist, _T.numpy, _T.__array__, _T.__bool__, _T.__float__, _T.__int__, _T.__index__, _T.__complex__,
    _T.__contains__, _T.__format__, _T.share_memory_,
}  # fmt: skip
"""Reads of values by Python, as one rank alone does them to print."""


def on_sharded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out ``func``, which got at least one sharded parameter."""
    if func is DistributedParameter.gather:
        return _gather(args[0])
    if func is torch.autograd.grad:
        return gradients(args, kwargs, _what("autograd.grad", _parameters((args, kwargs))))
    if func is torch.autograd.backward:
        return backward(args, kwargs)
    args, kwargs, result = on_parts(func, args, kwargs)
    if result is not NotImplemented:
        return result
    if func is _T.__iter__:
        return iter(args[0].unbind(0))
    if func in (_T.dim, _T.ndimension):
        _refuse_of_slice(args[0])
    if _needs_no_values(func, args, kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    targets = [t for t in _targets(func, args, kwargs) if isinstance(t, ShardedParameter)]
    if targets:
        return _write(func, args, kwargs, targets)
    parameters = _parameters((args, kwargs))
    outside = engine().outside
    if func in (_T.view_as, _T.expand_as) and args[0] is args[-1] and torch.is_grad_enabled():
        func, args = _leaf_of_graph(args[0]), args[:1]
    if engine().idle and func in _TO_HOST and not outside.is_near(parameters):
        raise ShardedAccessError(_advice(func, parameters))
    with outside.on_demand(parameters, func, _what(func, parameters)):
        out = func(*args, **kwargs)
        return _apart(func, args, kwargs, out, parameters) if engine().idle else out


def _refuse_of_slice(parameter: ShardedParameter, draws: bool = False) -> None:
    """Functions of ``nn.init`` that ask for sizes, or draw again by what came out, would take a slice for its layer.

    The others fill the layer's whole tensor.
    """
    flat, index = place_of(parameter)
    at = calling_frame() if flat.is_slice else None
    if at is None or at.f_code.co_filename != nn.init.__file__:
        return
    if draws and not (at.f_code.co_name == "_no_grad_trunc_normal_" and "where" in at.f_code.co_names):
        return
    while at.f_back is not None and at.f_back.f_code.co_filename == nn.init.__file__:
        at = at.f_back
    raise ShardedAccessError(
        f"nn.init.{at.f_code.co_name} goes by the sizes or values of {flat.names[index]!r}, of which the "
        "tensor-parallel ranks have slices: it would take a slice for the layer. Initialise before "
        "bmt.parallelize_module, or give the parameter an init_method, which bmt.init_parameters(model) calls with the "
        "whole."
    )


def _leaf_of_graph(parameter: ShardedParameter) -> Callable[[torch.Tensor], torch.Tensor]:
    """What ``p.view_as(p)`` does: nobody wants that but for its place in autograd's graph, where hooks are put.

    A copy is one step from it, too, and may be kept, which a view of a gather buffer may not.  The place is another for
    each dtype that ``p`` is gathered in, so that from here on that is one.
    """
    flat, index = place_of(parameter)
    name = repr(flat.names[index])
    if is_for_edge():
        raise ShardedAccessError(
            f"A gradient edge of {name}, which is sharded, leads to the gradient of this rank's samples alone. Give "
            "torch.autograd.grad the parameter itself: that is the mean over the ranks."
        )
    if flat.casts and not flat.autocasts:
        raise ShardedAccessError(
            f"{name} is gathered in the dtype of its precision policy, and has another place in autograd's graph each "
            "time, so that a hook there (register_multi_grad_hook) is not called. Use parameter.register_hook."
        )
    if flat.autocasts and engine().idle:
        unit = unit_of_flat(flat)
        engine().outside.release([unit])
        unit.never_cast()
    return _T.clone


def on_view(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out ``func``, which got at least one ViewOfSharded."""
    views = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, ViewOfSharded)]
    targets = [t for t in _targets(func, args, kwargs) if isinstance(t, ViewOfSharded)]
    if not targets:
        if not _needs_no_values(func, args, kwargs):
            for view in views:
                _refresh(view)
        plain, named = tree_map(_plain, (args, kwargs))
        out = func(*plain, **named)
        return _follow(func, args, kwargs, out, [p for view in views for p in view.parameters])
    parameters = [p for target in targets for p in target.parameters]
    with _writing(parameters, _what(func, parameters)):
        func(*tree_map(_present, args), **tree_map(_present, kwargs))
    for view in views:
        _refresh(view)
    return targets[0]


def _gather(parameter: DistributedParameter) -> torch.Tensor:
    if not isinstance(parameter, ShardedParameter):
        return parameter.clone()
    if not engine().idle:  # as it rests, whatever the forward computes in
        with gathered(parameter):
            return parameter.clone()
    with engine().outside.on_demand([parameter], None, _what("gather", [parameter])):
        return parameter.clone()


def _needs_no_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return name != "__get__" or getattr(getattr(func, "__self__", None), "__name__", "") in _ATTRIBUTES
    if func is _T.type:
        return len(args) == 1 and not kwargs
    if func is _T.__format__:
        return args[0].dim() > 0 or not args[1]
    return func in _METHODS


def _targets(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What ``func`` writes to."""
    return [] if func in _TO_HOST else written_by(getattr(func, "__name__", ""), args, kwargs)


# -- views -----------------------------------------------------------------------------------------------------------


def _apart(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, parameters: list[Any]
) -> Any:
    """What ``func`` gave outside of any forward, without parts of gather buffers."""
    leaves, structure = tree_flatten(out)
    for index, leaf in enumerate(leaves):
        copied: Any = engine().outside.apart(leaf)
        if copied is not leaf and not copied.requires_grad:
            copied = ViewOfSharded.of(copied, parameters, _again(func, args, kwargs, index))
        leaves[index] = copied
    return tree_unflatten(leaves, structure)


def _follow(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, parameters: list[Any]
) -> Any:
    """Views of a ViewOfSharded are some, too."""
    leaves, structure = tree_flatten(out)
    for index, leaf in enumerate(leaves):
        if type(leaf) is torch.Tensor and leaf._is_view() and not leaf.requires_grad:
            leaves[index] = ViewOfSharded.of(leaf, parameters, _again(func, args, kwargs, index))
    return tree_unflatten(leaves, structure)


def _again(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], index: int
) -> Callable[[], torch.Tensor]:
    def again() -> torch.Tensor:
        out: torch.Tensor = tree_leaves(func(*tree_map(_present, args), **tree_map(_present, kwargs)))[index]
        return out

    return again


def _present(value: Any) -> Any:
    return value.again() if isinstance(value, ViewOfSharded) else value


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, ViewOfSharded) else value


def _refresh(view: ViewOfSharded) -> None:
    """Let ``view`` show what the parameters hold now."""
    if view.is_fresh:
        return
    sharded = [p for p in view.parameters if isinstance(p, ShardedParameter)]
    with torch.no_grad():
        if not sharded:
            view.refresh(view.again())
            return
        with engine().outside.on_demand(sharded, None, _what("a view", sharded)):
            view.refresh(view.again())


# -- writes ----------------------------------------------------------------------------------------------------------


def _write(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[ShardedParameter]
) -> Any:
    initializes = getattr(func, "__module__", "") == nn.init.__name__  # without gradients, whatever the mode
    if torch.is_grad_enabled() and not initializes and any(t.requires_grad for t in targets):
        raise RuntimeError(
            f"{_what(func, targets)}: a leaf that requires grad is changed in place; do it under torch.no_grad()."
        )
    parameters, target = _parameters((args, kwargs)), targets[0]
    with torch.no_grad():
        if len(parameters) == 1 and func in _FILLS:
            return _fill(func, args, kwargs, target)
        if func in _ELEMENTWISE and target is args[0] and _lie_alike(target, parameters):
            return _elementwise(func, args, kwargs)
        with _writing(parameters, _what(func, parameters), targets):
            return func(*args, **kwargs)


@contextmanager
def _writing(parameters: list[Any], what: str, targets: list[Any] | None = None) -> Iterator[None]:
    """Whole ``parameters``, of which the body changes ``targets`` (None: all); all ranks keep rank 0's values."""
    sharded = [p for p in parameters if isinstance(p, ShardedParameter)]
    if not sharded:  # inside bmt.gathered
        with torch.no_grad():
            yield
        return
    with torch.no_grad(), engine().outside.on_demand(sharded, None, what):
        yield
        if engine().idle:
            for target in {id(t): t for t in (sharded if targets is None else targets)}.values():
                flat, index = place_of(target)
                keep_rank_0s(flat.unit.ctx, what, {flat.names[index]: raw_data(target)}, flat.slices)
                flat.expose()


def _fill(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], target: ShardedParameter
) -> torch.Tensor:
    _refuse_of_slice(target, draws=True)
    flat, index = place_of(target)
    what = _what(func, [target])
    flat.unit.ctx.engine.comes_to(what)
    whole = torch.empty(flat.whole_shape(index), dtype=flat.dtype, device=flat.shard.device)
    given, named = tree_map(lambda value: whole if value is target else value, (args, kwargs))
    func(*given, **named)
    whole = flat.own_slice(index, whole)
    keep_rank_0s(flat.unit.ctx, what, {flat.names[index]: whole}, flat.slices)
    flat.write(index, whole)
    flat.step_on([index])
    return target


def _lie_alike(target: ShardedParameter, parameters: list[ShardedParameter]) -> bool:
    flat, index = place_of(target)
    return all(place_of(p)[0].layout is flat.layout and p._index == index for p in parameters)


def _elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As on ``.data``, with operands that are the same on all ranks."""
    target = args[0]
    if func is _T.copy_:
        _require_shape(target, [*args[1:2], *kwargs.values()])
    others, named = tree_map(lambda value: _operand(value, target, _what(func, [target])), (args[1:], kwargs))
    func(target.data, *others, **named)
    flat, index = place_of(target)
    flat.step_on([index])
    return target


def _operand(value: Any, target: ShardedParameter, what: str) -> Any:
    if isinstance(value, ShardedParameter):
        return value.data
    if isinstance(value, torch.Tensor) and value.dim():
        flat, index = place_of(target)
        value = value.detach().to(flat.shard.device)
        if engine().idle:
            value = value.clone()
            keep_rank_0s(flat.unit.ctx, what, {flat.names[index]: value}, flat.slices)
    return value


def _require_shape(parameter: DistributedParameter, values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
            try:
                torch.broadcast_to(value, parameter.shape)
            except RuntimeError:
                raise ShardedAccessError(
                    f"Parameter {_where(parameter)} has shape {tuple(parameter.shape)}; it cannot take "
                    f"{tuple(value.shape)}."
                ) from None


def _parameters(tree: Any) -> list[ShardedParameter]:
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, ShardedParameter)]
    return list({id(p): p for p in found}.values())


def _where(parameter: DistributedParameter) -> str:
    return repr(parameter._flat.names[parameter._index]) if parameter._flat is not None else "?"


def _name(func: Any) -> str:
    return func if isinstance(func, str) else getattr(func, "__name__", str(func))


def _what(func: Any, parameters: Sequence[DistributedParameter]) -> str:
    names = ", ".join(_where(p) for p in parameters[:3])
    return f"{_name(func)} of {names}"


def _advice(func: Any, parameters: Sequence[DistributedParameter]) -> str:
    return (
        f"{_name(func)} reads the values of {', '.join(_where(p) for p in parameters[:3])}, which is sharded over the "
        "ranks. On every rank, read it inside `with bmt.gathered(module_or_parameter):`, or call parameter.gather()."
    )


ShardedParameter.operation = staticmethod(on_sharded)
ViewOfSharded.operation = staticmethod(on_view)
