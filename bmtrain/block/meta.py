"""Models built under ``torch.device("meta")``: made real one unit at a time, so that no rank ever holds the whole.

A unit's parameters are allocated whole on the device, initialised by the modules' own ``reset_parameters`` and then the
root's ``_init_weights(module)`` if it has one, cut into shards, and freed before the next unit's turn.  Buffers come
first, from ``_init_weights`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..errors import ConfigurationError
from ..shard.gathered import initialise
from ..shard.parameter import as_distributed, group_of, init_method_of, split_of
from .sharded import ShardedModule


def materialise(
    root: nn.Module, owner: nn.Module, parameters: Sequence[nn.Parameter], names: Sequence[str], device: torch.device
) -> list[nn.Parameter]:
    """Replace those of ``parameters`` that are on the meta device by initialised ones, everywhere in ``root``.

    Raises ConfigurationError that names what no initialisation reached.
    """
    real = {id(old): _allocate(old, device) for old in parameters if old.is_meta}
    if not real:
        return list(parameters)
    touched = []
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in real:
                module._parameters[name] = real[id(parameter)]
                touched.append(module)
    with torch.no_grad():
        _initialise(root, owner, touched, list(real.values()))
    fresh = [real.get(id(p), p) for p in parameters]
    missed = [n for n, p in zip(names, fresh, strict=True) if p.is_floating_point() and bool(torch.isnan(p).any())]
    if missed:
        raise ConfigurationError(
            f"Nothing initialised {_some(missed)}, built on the meta device. Give the module a reset_parameters() "
            "method or the model an _init_weights(module) method, or build the model on the CPU."
        )
    return fresh


def make_buffers(root: nn.Module) -> None:
    """Let the root's ``_init_weights(module)`` fill the buffers that are on the meta device, as transformers' does.

    Raise ConfigurationError for those that nothing filled: their values are lost.
    """
    init = getattr(root, "_init_weights", None)
    lost = []
    for prefix, module in root.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in names if callable(init) else ():
            module._buffers[name] = _unfilled(module._buffers[name])
        if names and callable(init) and all(p.is_meta for p in module._parameters.values() if p is not None):
            with torch.no_grad():
                init(module)
        lost += [f"{prefix}.{name}".lstrip(".") for name in names if _is_unfilled(module._buffers[name])]
    if lost:
        raise ConfigurationError(
            f"The values of the buffers {_some(lost)} were lost on the meta device. Create them with an explicit "
            "device='cpu'."
        )


def _unfilled(old: torch.Tensor) -> torch.Tensor:
    if old.dtype == torch.bool:
        return old  # no value would tell
    fill = torch.iinfo(old.dtype).min if not (old.is_floating_point() or old.is_complex()) else float("nan")
    return torch.full(old.shape, fill, dtype=old.dtype, device="cpu")


def _is_unfilled(buffer: torch.Tensor | None) -> bool:
    if buffer is None or buffer.is_meta:
        return buffer is not None
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(torch.isnan(buffer).any())
    return bool((buffer == torch.iinfo(buffer.dtype).min).any())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _allocate(old: nn.Parameter, device: torch.device) -> nn.Parameter:
    fill = float("nan") if old.is_floating_point() or old.is_complex() else 0
    new = as_distributed(nn.Parameter(torch.full(old.shape, fill, dtype=old.dtype, device=device), old.requires_grad))
    new._init_method, new._group, new._split = init_method_of(old), group_of(old), split_of(old)
    return new


def _initialise(
    root: nn.Module, owner: nn.Module, touched: Sequence[nn.Module], parameters: Sequence[nn.Parameter]
) -> None:
    inside = list(_own_modules(owner))
    for module in dict.fromkeys([*inside, *touched]):
        reset = getattr(module, "reset_parameters", None)
        if module in touched and callable(reset):
            reset()
    init = getattr(root, "_init_weights", None)
    if callable(init):
        for module in inside:
            init(module)
    for parameter in parameters:
        method = init_method_of(parameter)
        if callable(method):
            initialise(parameter, method)


def _own_modules(owner: nn.Module) -> Iterator[nn.Module]:
    """``owner`` and what is inside it, without the units inside it; children first, as ``apply`` goes."""
    for child in owner.children():
        if not isinstance(child, ShardedModule):
            yield from _own_modules(child)
    yield owner
