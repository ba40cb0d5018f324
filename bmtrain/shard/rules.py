"""What torch functions do on a parameter while it is sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..errors import ShardedAccessError
from .engine import engine
from .flat import flat_of, place_of
from .gathered import gathered
from .on_parts import on_parts
from .parameter import DistributedParameter, ShardedParameter
from .unit import ShardUnit, unit_of_flat

_T = torch.Tensor

_ATTRIBUTES = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "names", "output_nr", "retains_grad", "_version",
    "is_mps", "_backward_hooks", "_grad_fn", "_base", "is_xpu", "is_mkldnn", "is_sparse_csr", "is_vulkan", "is_ipu",
    "is_xla", "is_maia", "_post_accumulate_grad_hooks", "volatile", "name", "data", "grad", "_grad", "grad_dtype",
}  # fmt: skip
"""Attributes that a parameter answers without its values."""

_METHODS = {
    _T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.stride, _T.is_floating_point,
    _T.is_complex, _T.is_contiguous, _T.__len__, _T.__hash__, _T.requires_grad_, _T.get_device, _T.register_hook,
    _T.is_signed, _T.register_post_accumulate_grad_hook, _T.storage_offset, _T.type, _T.is_set_to,
    _T.untyped_storage,
    _T.data_ptr, _T.__repr__, _T.__format__, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_same_size,
    _T.is_inference, _T.is_shared, _T.new_zeros, _T.new_ones, _T.new_empty, _T.new_full, _T.new_tensor,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
}  # fmt: skip

_ELEMENTWISE = {
    _T.copy_, _T.zero_, _T.fill_, _T.add_, _T.sub_, _T.mul_, _T.div_, _T.neg_, _T.lerp_, _T.clamp_, _T.clamp_min_,
    _T.clamp_max_, _T.addcmul_, _T.addcdiv_, _T.sign_, _T.abs_, _T.sqrt_, _T.pow_, _T.__iadd__, _T.__isub__,
    _T.__imul__, _T.__itruediv__, torch._foreach_add_, torch._foreach_mul_, torch._foreach_lerp_, torch._foreach_copy_,
}  # fmt: skip
"""In-place functions whose every output element depends on the same element of the inputs only."""

_NEVER = {
    _T.item, _T.tolist, _T.numpy, _T.cpu, _T.cuda, _T.to, _T.clone, _T.mean, _T.std, _T.norm, _T.__bool__,
    _T.share_memory_,
}  # fmt: skip


def on_sharded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out ``func``, which got at least one sharded parameter."""
    if func is DistributedParameter.gather:
        with gathered(args[0]):
            return args[0].detach().clone()
    args, kwargs, result = on_parts(func, args, kwargs)
    if result is not NotImplemented:
        return result
    with torch._C.DisableTorchFunctionSubclass():
        if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
            return _attribute(func, args)
        if func in _METHODS:
            return func(*args, **kwargs)
        if func in _ELEMENTWISE:
            return _elementwise(func, args, kwargs)
    units = _units((args, kwargs))
    outside = engine().outside
    if (func not in _NEVER and outside.may_gather(func)) or outside.is_near(units):
        with outside.on_demand(units):
            out = func(*args, **kwargs)
            return tree_map(outside.apart, out) if engine().idle else out
    raise ShardedAccessError(_advice(func, args))


def _attribute(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    name = getattr(getattr(func, "__self__", None), "__name__", "")
    if func.__name__ == "__get__" and name not in _ATTRIBUTES:
        raise ShardedAccessError(_advice(name, args))
    return func(*args)


def _elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = args[0]
    if isinstance(target, (list, tuple)) or not isinstance(target, ShardedParameter):
        raise ShardedAccessError(_advice(func, args))
    flat, index = place_of(target)

    def local(value: Any) -> Any:
        other = flat_of(value)
        if other is not None and value.shape == target.shape:
            if other.layout is flat.layout and value._index == index:
                return other.local(other.shard, index)
            raise ShardedAccessError(
                f"{_name(func)} mixes two sharded parameters that lie differently; use it inside "
                "`with bmt.gathered(...)`."
            )
        if isinstance(value, torch.Tensor) and value.dim():
            return flat.local_part(value.to(flat.shard.device).expand(target.shape), index)
        return value

    if func is _T.copy_:
        _require_shape(target, args[1])
    with torch.no_grad():
        others, named = [local(a) for a in args[1:]], {k: local(v) for k, v in kwargs.items()}
        flat.write_local(index, lambda part: func(part, *others, **named))
    return target


def _require_shape(parameter: DistributedParameter, value: torch.Tensor) -> None:
    try:
        torch.broadcast_to(value, parameter.shape) if value.shape != parameter.shape else None
    except RuntimeError:
        raise ShardedAccessError(
            f"Parameter {_where(parameter)} has shape {tuple(parameter.shape)}; it cannot take {tuple(value.shape)}."
        ) from None


def _units(tree: Any) -> list[ShardUnit]:
    found: dict[int, ShardUnit] = {}
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, ShardedParameter):
            unit = unit_of_flat(place_of(leaf)[0])
            found[id(unit)] = unit
    return list(found.values())


def _where(parameter: DistributedParameter) -> str:
    return repr(parameter._flat.names[parameter._index]) if parameter._flat is not None else "?"


def _name(func: Any) -> str:
    return func if isinstance(func, str) else getattr(func, "__name__", str(func))


def _advice(func: Any, args: tuple[Any, ...]) -> str:
    names = [_where(leaf) for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, ShardedParameter)]
    return (
        f"{_name(func)} needs the values of {', '.join(names[:3]) or 'a parameter'}, which is sharded over the ranks. "
        "On every rank, read it inside `with bmt.gathered(module_or_parameter):`, or change it inside "
        "`with bmt.gathered(..., write=True):`."
    )


ShardedParameter.operation = staticmethod(on_sharded)
