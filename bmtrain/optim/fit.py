"""Whether a state fits an optimizer, asked on all ranks before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..alike import misfit, require_same
from ..errors import CheckpointError
from ..objects import allgather_objects
from ..shard.flat import flat_of
from ..shard.sharded_tensor import ShardedTensor
from .pieces import all_params

CheckEntry = Callable[[Any, Mapping[str, Any]], Sequence[str]]
"""The problems of one parameter's state."""


def require_fit(
    optimizer: torch.optim.Optimizer, state: Any, check: CheckEntry, problems: Sequence[str] = (), own: bool = False
) -> None:
    """Collective.  Raises CheckpointError on every rank unless ``state`` fits, and is the same on all.

    Args:
        check: of a parameter and its entry.
        problems: found already.
        own: whether each rank has a state of its own, not the same whole one.
    """
    kind = type(optimizer).__name__
    found = [*problems, *(_structure(optimizer, state, check) if not problems else [])]
    every = allgather_objects(found)
    if any(every):
        rank = next(rank for rank, theirs in enumerate(every) if theirs)
        where = "" if all(theirs == every[0] for theirs in every) else f" on rank {rank}"
        raise CheckpointError(
            f"The optimizer state does not fit {kind}{where}; nothing was loaded: {'; '.join(every[rank][:8])}."
        )
    if own:
        return
    tensors: dict[str, torch.Tensor] = {}
    others: list[str] = []
    _flatten("", {"state": state["state"], "param_groups": state["param_groups"]}, tensors, others)
    require_same("state", kind, tensors, others, "Read the same file on every rank.", noun="states")


def _structure(optimizer: torch.optim.Optimizer, state: Any, check: CheckEntry) -> list[str]:
    params = all_params(optimizer.param_groups)
    if not isinstance(state, Mapping):
        return [f"a {type(state).__name__} given, a dict needed"]
    entries, groups = state.get("state"), state.get("param_groups")
    if not isinstance(entries, Mapping) or not isinstance(groups, (list, tuple)):
        return ["it needs a dict 'state' and a list 'param_groups'"]
    if any(not isinstance(g, Mapping) or not isinstance(g.get("params"), (list, tuple)) for g in groups):
        return ["every group in 'param_groups' needs a list 'params'"]
    given, wanted = [len(g["params"]) for g in groups], [len(g["params"]) for g in optimizer.param_groups]
    if given != wanted:
        return [f"its groups have {given} parameters, the optimizer's have {wanted}"]
    problems = []
    for number, (own, group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for name, value in group.items():
            if name in own and _is_number(own[name]) and not _is_number(value):
                problems.append(f"group {number}: {name} is a {type(value).__name__}, not a number")
    for key, entry in entries.items():
        if not isinstance(key, int):  # torch keeps a state of something else as it is
            continue
        if not 0 <= key < len(params):
            problems.append(f"parameter {key} of {len(params)} has a state")
        elif not isinstance(entry, Mapping):
            problems.append(f"parameter {key} has a {type(entry).__name__} as state, not a dict")
        else:
            problems += [f"parameter {key} has {problem}" for problem in check(params[key], entry)]
    return problems


def shape_in_state(parameter: Any, entry: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a parameter's states: the whole one, or that of its slice where ``entry`` has them in parts."""
    flat, shape = flat_of(parameter), tuple(parameter.shape)
    in_parts = any(isinstance(value, ShardedTensor) for value in entry.values())
    return shape if flat is None or in_parts else flat.whole_shape(parameter._index)


def tensor_problem(name: str, given: Any, shape: Sequence[int], dtype: torch.dtype) -> list[str]:
    """Why ``given`` is no state ``name`` of this shape and kind, if it is not."""
    if isinstance(given, torch.Tensor) and given.shape != torch.Size(shape):
        return [f"shape {tuple(given.shape)} there, {tuple(shape)} here ({name})"]
    reason = misfit(given, shape, dtype)
    return [] if reason is None else [f"{name}: {reason}"]


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_meta
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number_problem(name: str, given: Any) -> list[str]:
    """Why ``given`` is no number, if it is not."""
    return [] if _is_number(given) else [f"{name}: a {type(given).__name__} given, a number needed"]


def _flatten(name: str, value: Any, tensors: dict[str, torch.Tensor], others: list[str]) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _flatten(f"{name}.{key}" if name else str(key), value[key], tensors, others)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            _flatten(f"{name}.{number}", inner, tensors, others)
    elif isinstance(value, ShardedTensor):
        others.append(f"{name} {tuple(value.shape)} {value.dtype} in parts")
    elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
        tensors[name] = value
    elif value is None or isinstance(value, (bool, int, float, str)):
        others.append(f"{name} {value!r}")
    else:
        others.append(f"{name} ({type(value).__name__})")
