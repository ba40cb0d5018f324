"""The whole values of a model, one tensor after the other, and of each a piece after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..shard.flat import flat_of, place_of
from ..shard.in_parts import part_at
from ..shard.parameter import DistributedParameter
from ..shard.sharded_tensor import ShardedTensor, unsliced

_AT_ONCE = 16 << 20
_DECIDES = {"state_dict", "_save_to_state_dict", "get_extra_state"}


def named_state(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The keys of the state dict with sharded parameters as values; nothing is gathered.  None: what a module adds."""
    found: dict[str, torch.Tensor | None] = {}
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


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The same of a module that adds nothing."""
    return {name: value for name, value in named_state(module).items() if value is not None}


def methods_of(module: nn.Module) -> set[str]:
    """Names that ``module``'s class overrides from nn.Module, outside torch itself."""
    return {n for c in type(module).__mro__ if not c.__module__.startswith(("torch.", "bmtrain.")) for n in vars(c)}


def comes_in_turn(module: nn.Module) -> bool:
    """Whether the state dict is what ``named_state`` names, in ordinary tensors: nothing of the model's changes it."""
    return not any(
        inner._state_dict_hooks or inner._state_dict_pre_hooks or _DECIDES & methods_of(inner)
        for inner in module.modules()
    ) and all(map(_is_ordinary, named_state(module).values()))


def _is_ordinary(value: torch.Tensor | None) -> bool:
    if value is None:
        return False
    if flat_of(value) is not None or isinstance(value, ShardedTensor):
        return True
    plain = type(value) in (torch.Tensor, nn.Parameter, DistributedParameter)
    return plain and value.layout == torch.strided and not value.is_meta


def metadata_of(module: nn.Module) -> dict[str, dict[str, int]]:
    """What torch adds to a state dict as its ``_metadata``."""
    return {name: {"version": inner._version} for name, inner in module.named_modules(remove_duplicate=False)}


def whole_in_pieces(value: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The flattened whole of one value of ``named_state``, from its first element to its last.  Collective.

    Gives where each piece begins, and its values, (n,), not to be written: of a sharded one at most 16 MiB, which are
    gone when the next is asked for.
    """
    flat = flat_of(value)
    if flat is not None:
        index = place_of(value)[1]
        value = part_at(flat.place_of(index), flat.read_part(index))
    if not isinstance(value, ShardedTensor):
        yield 0, value.detach().reshape(-1)
        return
    place = value.part.place
    if place.split is not None or value.shape != place.shape:
        yield 0, unsliced(value).reshape(-1)
        return
    ctx, part = place.ctx, value.part.read()
    ctx.engine.comes_to(f"the whole of {place.name}")
    at_once = _AT_ONCE // part.element_size()
    for rank, kept in enumerate(place.ranges):
        for start in range(kept.start, kept.stop, at_once):
            size = min(at_once, kept.stop - start)
            if rank == ctx.shard_rank:
                piece = part[start - kept.start :][:size]
            else:
                piece = torch.empty(size, dtype=part.dtype, device=part.device)
            ctx.shard_group.broadcast(piece.view(torch.uint8), rank)
            yield start, piece


def facts_of(value: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the same."""
    flat = flat_of(value)
    if flat is not None:
        return flat.whole_shape(place_of(value)[1]), flat.dtype
    return (value.part.place.whole_shape if isinstance(value, ShardedTensor) else tuple(value.shape)), value.dtype
