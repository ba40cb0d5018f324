"""The whole values of a model, one tensor after the other: nowhere more than one of them is whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..shard.flat import flat_of, place_of
from ..shard.in_parts import part_at
from ..shard.parameter import DistributedParameter
from ..shard.sharded_tensor import ShardedTensor, unsliced

_DECIDES = {"state_dict", "_save_to_state_dict", "get_extra_state"}


def named_state(module: nn.Module) -> dict[str, Any]:
    """The keys of the state dict with sharded parameters as values; nothing is gathered."""
    found: dict[str, Any] = {}
    for prefix, inner in module.named_modules(remove_duplicate=False):
        dot = prefix + "." if prefix else ""
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                found[dot + name] = parameter
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                found[dot + name] = buffer
        if type(inner).get_extra_state is not nn.Module.get_extra_state:
            found[dot + "_extra_state"] = None
    return found


def methods_of(module: nn.Module) -> set[str]:
    """Names that ``module``'s class overrides from nn.Module, outside torch itself."""
    return {n for c in type(module).__mro__ if not c.__module__.startswith(("torch.", "bmtrain.")) for n in vars(c)}


def comes_in_turn(module: nn.Module) -> bool:
    """Whether the state dict is what ``named_state`` names, in ordinary tensors: nothing of the model's changes it."""
    return not any(
        inner._state_dict_hooks or inner._state_dict_pre_hooks or _DECIDES & methods_of(inner)
        for inner in module.modules()
    ) and all(map(_is_ordinary, named_state(module).values()))


def _is_ordinary(value: Any) -> bool:
    if flat_of(value) is not None or isinstance(value, ShardedTensor):
        return True
    plain = type(value) in (torch.Tensor, nn.Parameter, DistributedParameter)
    return plain and value.layout == torch.strided and not value.is_meta


def metadata_of(module: nn.Module) -> dict[str, Any]:
    """What torch adds to a state dict as its ``_metadata``."""
    return {name: {"version": inner._version} for name, inner in module.named_modules(remove_duplicate=False)}


def whole_value(value: torch.Tensor) -> torch.Tensor:
    """One value of ``named_state`` as an ordinary tensor, which may be the model's own memory.  Collective."""
    flat = flat_of(value)
    if flat is not None:
        index = place_of(value)[1]  # type: ignore[arg-type]
        return unsliced(part_at(flat.place_of(index), flat.read_part(index)))
    return unsliced(value) if isinstance(value, ShardedTensor) else value.detach()


def facts_of(value: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the same."""
    flat = flat_of(value)
    if flat is not None:
        return flat.whole_shape(place_of(value)[1]), flat.dtype  # type: ignore[arg-type]
    return (value.part.place.whole_shape if isinstance(value, ShardedTensor) else tuple(value.shape)), value.dtype
