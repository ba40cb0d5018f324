"""Different Parameters on one memory: ``b.weight = nn.Parameter(a.weight.data)``."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigurationError
from ..log import warn
from ..shard.flat import flat_of


def tie(root: nn.Module, rank: int) -> None:
    """Make Parameters that show the same memory one Parameter, as their values are the same at all times.

    Raises ConfigurationError for those that share a part of it.
    """
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    known: dict[int, tuple[nn.Parameter, str]] = {}
    for prefix, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and flat_of(parameter) is None and _has_memory(parameter):
                full = f"{prefix}.{name}" if prefix else name
                places.setdefault(id(parameter), []).append((module, name, full))
                known.setdefault(id(parameter), (parameter, full))
    # Only the few storages that several show are looked at; parts of one that do not meet stay what they are.
    by_storage: dict[int, list[tuple[nn.Parameter, str]]] = {}
    for parameter, full in known.values():
        by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((parameter, full))
    tied = []
    for group in by_storage.values():
        for (first, its_name), (second, name) in _pairs(group):
            if _view(first) != _view(second) and not (first.is_contiguous() and second.is_contiguous()):
                continue  # columns of one matrix, say, which need not meet
            if _view(first) != _view(second) or first.requires_grad != second.requires_grad:
                raise ConfigurationError(
                    f"Parameters {its_name!r} and {name!r} share a part of their memory, or only one of them trains. "
                    "Make them one Parameter of one module, and views of it where the other was used."
                )
            for owner, key, _ in places[id(second)]:
                owner._parameters[key] = first
            tied.append(f"{name} = {its_name}")
    if tied and rank == 0:
        warn(
            f"Different Parameters show the same memory and are one from now on ({', '.join(tied[:5])}"
            f"{' ...' if len(tied) > 5 else ''}): an optimizer steps it once, with the sum of both gradients.",
            stacklevel=2,
        )


def _has_memory(parameter: nn.Parameter) -> bool:
    usable = not nn.parameter.is_lazy(parameter) and not parameter.is_meta and parameter.layout == torch.strided
    return usable and parameter.numel() > 0


def _pairs(
    group: list[tuple[nn.Parameter, str]],
) -> list[tuple[tuple[nn.Parameter, str], tuple[nn.Parameter, str]]]:
    """Each but the first of every run of Parameters whose memory meets, beside the first."""
    found = []
    first = None
    end = -1
    for entry in sorted(group, key=lambda entry: int(entry[0].storage_offset())) if len(group) > 1 else []:
        offset = int(entry[0].storage_offset())
        last = offset + sum((size - 1) * stride for size, stride in zip(entry[0].shape, entry[0].stride(), strict=True))
        if first is not None and offset <= end:
            found.append((first, entry))
        else:
            first = entry
        end = max(end, last)
    return found


def _view(parameter: nn.Parameter) -> tuple[object, ...]:
    return parameter.storage_offset(), parameter.shape, parameter.stride(), parameter.dtype
