"""What the factory gave: a model and its inputs, or inputs made up from forward's annotations and ``--shape``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_KINDS = {
    "float": torch.float32, "float32": torch.float32, "float64": torch.float64, "double": torch.float64,
    "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16, "long": torch.int64,
    "int64": torch.int64, "int": torch.int64, "int32": torch.int32, "bool": torch.bool,
}  # fmt: skip


class InputsError(ValueError):
    """There are no inputs to run the model with; the message says how to give some."""


@dataclass
class Case:
    """A model and what to call it with. ``loss`` makes a scalar of the output; None takes what the output offers."""

    model: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], torch.Tensor] | None = None


def make_case(made: Any, shapes: Sequence[str]) -> Case:
    """The case of a factory's result: ``model``, or a tuple of it and inputs (tuple, dict, tensor) and a loss."""
    if isinstance(made, torch.nn.Module):
        return Case(made, (), derive(made, shapes))
    if not isinstance(made, (tuple, list)) or not made or not isinstance(made[0], torch.nn.Module):
        raise InputsError("the factory must return a torch.nn.Module, or a tuple that begins with one")
    case = Case(made[0])
    given = False
    for item in made[1:]:
        if isinstance(item, Mapping):
            case.kwargs, given = dict(item), True
        elif isinstance(item, (tuple, list)):
            case.args, given = tuple(item), True
        elif isinstance(item, torch.Tensor):
            case.args, given = (item,), True
        elif callable(item):
            case.loss = item
        else:
            raise InputsError(f"the factory returned a {type(item).__name__}, which is neither inputs nor a loss")
    if not given:
        case.kwargs = derive(case.model, shapes)
    return case


def derive(model: torch.nn.Module, shapes: Sequence[str]) -> dict[str, Any]:
    """Inputs by name. A shape is ``NAME=2x8``, ``NAME=2x8:long`` or ``NAME=2x8:long:50`` (numbers below 50)."""
    wanted = dict(_parse(text) for text in shapes)
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in wanted if name not in parameters and not open_ended]
    if unknown:
        raise InputsError(f"--shape names {', '.join(unknown)}, but forward takes {', '.join(parameters)}")
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in wanted
    ]
    if missing:
        options = " ".join(f"--shape {name}=2x8{_hint(_kind(model, name))}" for name in missing)
        raise InputsError(
            f"{type(model).__name__}.forward needs {', '.join(missing)}; let the factory return (model, inputs), or "
            f"give sizes such as {options}"
        )
    return {name: _random(model, _kind(model, name), *sizes) for name, sizes in wanted.items()}


def _parse(text: str) -> tuple[str, tuple[list[int], str, int]]:
    name, separator, rest = text.partition("=")
    sizes, _, kind = rest.partition(":")
    kind, _, high = kind.partition(":")
    try:
        if not separator or (kind and kind not in _KINDS):
            raise ValueError
        return name.strip(), ([int(size) for size in sizes.split("x") if size], kind, int(high or 0))
    except ValueError:
        raise InputsError(f"--shape {text}: write NAME=2x8, NAME=2x8:long or NAME=2x8:long:50") from None


def _kind(model: torch.nn.Module, name: str) -> torch.dtype:
    """The dtype that forward's annotation of ``name`` tells; float32 if it tells none."""
    try:
        hints = typing.get_type_hints(model.forward)
    except Exception:  # an annotation that needs names only a type checker sees
        hints = dict(inspect.get_annotations(model.forward))
    text = str(hints.get(name, ""))
    if "LongTensor" in text or "Int[" in text or "IntTensor" in text:
        return torch.int64
    return torch.bool if "BoolTensor" in text or "Bool[" in text else torch.float32


def _hint(kind: torch.dtype) -> str:
    return {torch.int64: ":long", torch.bool: ":bool"}.get(kind, "")


def _random(model: torch.nn.Module, annotated: torch.dtype, sizes: list[int], kind: str, high: int) -> torch.Tensor:
    dtype = _KINDS[kind] if kind else annotated
    if dtype is torch.bool:
        return torch.ones(sizes, dtype=torch.bool)
    if dtype.is_floating_point:
        return torch.randn(sizes, dtype=dtype)
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return torch.randint(high or min(tables, default=2), sizes, dtype=dtype)
