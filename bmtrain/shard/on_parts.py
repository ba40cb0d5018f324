"""Torch functions on sharded parameters that are done part by part, as on their ``.data``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UnsupportedError
from .engine import engine
from .flat import flat_of
from .parameter import ShardedParameter
from .sharded_tensor import TAKE_KIND, NeedsWholeError, ShardedTensor, is_in_place, whole_operands

_T = torch.Tensor

_LIKE = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    torch.randint_like,
}  # fmt: skip

_OF_ALL_ELEMENTS = {"norm", "vector_norm", "std", "var", "mean", "max", "min", "amax", "amin"}

_OF_LAYOUT = {_T.stride, _T.is_contiguous}


def on_parts(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """What ``func`` gives, which got a sharded parameter; NotImplemented if it needs whole values.

    Before that, the arguments to go on with: under autograd ShardedTensors beside parameters are gathered.
    """
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):  # an attribute, asked for often
        return args, kwargs, NotImplemented
    leaves = tree_leaves((args, kwargs))
    mixed = any(isinstance(leaf, ShardedTensor) for leaf in leaves)
    in_place = is_in_place(name)
    if mixed and torch.is_grad_enabled() and not in_place and func not in TAKE_KIND:
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
            args, kwargs = whole_operands(args, kwargs)
            return args, kwargs, NotImplemented
    alone = engine().idle and (
        func is _T.detach
        or (func in _LIKE and not kwargs.get("requires_grad"))
        or (name.startswith("_foreach_") and not torch.is_grad_enabled())
    )
    if name in _OF_ALL_ELEMENTS and args and engine().idle and _is_slice(args[0]):
        if torch.is_grad_enabled() and args[0].requires_grad:
            raise UnsupportedError(
                f"{name} of a parameter of which this rank has a tensor-parallel slice would be the slice's, with "
                "gradients. Take it of p.data, which gives the layer's, or of p.square().sum(), a sum over slices."
            )
        alone = True
    alone = alone or func in _OF_LAYOUT or (func in TAKE_KIND and not isinstance(args[0], ShardedParameter))
    if not mixed and not alone:
        return args, kwargs, NotImplemented
    try:
        parts, named = tree_map(_data, (args, kwargs))
        out = func(*parts, **named)
    except NeedsWholeError:
        if not mixed:
            return args, kwargs, NotImplemented
        if in_place and isinstance(args[0], ShardedTensor):
            raise
        args, kwargs = whole_operands(args, kwargs)
        return args, kwargs, NotImplemented
    return args, kwargs, args[0] if in_place and args and isinstance(args[0], _T) else out


def _is_slice(value: Any) -> bool:
    flat = flat_of(value) if isinstance(value, ShardedParameter) else None
    return flat is not None and flat.is_slice and flat.unit.ctx.tensor_group.world_size > 1


def _data(value: Any) -> Any:
    return value.data if isinstance(value, ShardedParameter) else value
