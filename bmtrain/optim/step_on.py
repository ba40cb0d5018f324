"""On what an optimizer may step: this rank's shards, whole tensors shared out over the ranks, or the whole model.

Nothing is taken on trust.  An optimizer of torch's is known by its class and by overriding nothing of it; others are
known by name, and all of them are tried out on small tensors that are cut, or stepped apart.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch.utils._pytree import tree_map

from ..errors import ConfigurationError

StepOn = Literal["shards", "tensors", "whole"]

_ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop,
)  # fmt: skip
_ELEMENTWISE_NAMES = {
    "Lion", "AdaBelief", "AdaBound", "Adan", "AdamWLegacy", "DiffGrad", "LaProp", "MADGRAD", "NAdamLegacy", "NAdamW",
    "RAdamLegacy", "RMSpropTF", "SGDW", "Tiger", "Yogi",
}  # fmt: skip
"""Of other packages, if the trial agrees: some have options that look at the whole tensor."""
_TENSOR_NAMES = {
    "Adafactor", "AdafactorBigVision", "AdamP", "CAME", "LAMB", "LARS", "Lamb", "Lars", "Muon", "NovoGrad",
    "NvNovoGrad", "SGDP", "SOAP", "Shampoo",
}  # fmt: skip
"""Those that treat each tensor by itself, if the trial agrees: some clip the norm of all gradients."""
_HARMLESS = {
    "__init__", "__repr__", "__setstate__", "__getstate__", "state_dict", "load_state_dict", "add_param_group",
    "zero_grad",
}  # fmt: skip
_STEPS, _MOST = 3, 24


def choose(optimizer: torch.optim.Optimizer, asked: StepOn | None) -> StepOn:
    """What ``optimizer`` is to step on.

    Args:
        asked: what the user says; None to find out.

    Raises ConfigurationError when a trial shows that what was asked for would give other numbers.
    """
    if asked is not None and asked not in get_args(StepOn):
        raise ConfigurationError(f"step_on must be one of {', '.join(get_args(StepOn))}, not {asked!r}.")
    if asked is None:
        return _find(optimizer)
    if (asked == "shards" and _try(optimizer, _cut_is_same) is False) or (
        asked == "tensors" and _try(optimizer, _apart_is_same) is False
    ):
        each = "element" if asked == "shards" else "tensor"
        raise ConfigurationError(
            f"{type(optimizer).__name__} cannot step on {asked}: tried out on small tensors, what it does to one "
            f'{each} depends on others. Leave step_on out, or use step_on="whole".'
        )
    return asked


def _find(optimizer: torch.optim.Optimizer) -> StepOn:
    name = type(optimizer).__name__
    if is_unchanged(type(optimizer)):
        return "shards" if _try(optimizer, _cut_is_same) is not False else "whole"
    if name in _ELEMENTWISE_NAMES and _try(optimizer, _cut_is_same):
        return "shards"
    if name in _ELEMENTWISE_NAMES | _TENSOR_NAMES and _try(optimizer, _apart_is_same):
        return "tensors"
    return "whole"


def is_unchanged(cls: type) -> bool:
    """Whether ``cls`` is a known element-wise class, or derives from one without changing how it steps."""
    own = []
    for known in cls.__mro__:
        if known in _ELEMENTWISE:
            break
        own.append(known)
    else:
        return False
    for name in {name for base in own for name in vars(base)} & set(dir(known)):
        value = getattr(cls, name)
        if name not in _HARMLESS and callable(value) and not name.startswith("__"):
            if inspect.unwrap(value) is not inspect.unwrap(getattr(known, name)):
                return False
    return True


# ---- trials
# ---------------------------------------------------------------------------------------------------------------------


def _try(optimizer: torch.optim.Optimizer, same: Any) -> bool | None:
    """Whether ``same`` holds for every group; None if the optimizer cannot be tried out."""
    standard = vars(torch.optim.SGD([torch.zeros(1, device="cpu")]))
    extra = {k: v for k, v in vars(optimizer).items() if k not in standard and k != "step"}
    if not is_unchanged(type(optimizer)) and not all(map(_is_simple, extra.values())):
        return None
    outer = torch.random.get_rng_state()
    try:
        with torch.no_grad(), torch.device("cpu"):
            return all(same(optimizer, group) for group in optimizer.param_groups if group["params"])
    except Exception:
        return None
    finally:
        torch.random.set_rng_state(outer)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_simple, value))
    if isinstance(value, dict):
        return all(map(_is_simple, value.values()))
    return value is None or isinstance(value, (bool, int, float, str)) or (type(value) is torch.Tensor)


def _cut_is_same(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether cutting a tensor into two flat ones changes nothing."""
    for number, (parameter, shape) in enumerate(_shapes(group)):
        value, grads = _data(shape, number)
        where = value.numel() * 2 // 5
        sizes = [where, value.numel() - where]
        (whole,), _ = _stepped(optimizer, group, parameter, [value], [[g] for g in grads])
        cut = [torch.split(g.view(-1), sizes) for g in grads]
        parts, _ = _stepped(optimizer, group, parameter, torch.split(value.view(-1), sizes), cut)
        if not _close(torch.cat(parts), whole.view(-1), value.view(-1)):
            return False
    return True


def _apart_is_same(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether tensors may be stepped without each other, and a rank may have none."""
    shapes = (_shapes(group) * 3)[:3]
    parameter = shapes[0][0]
    values, grads = zip(*(_data(shape, number) for number, (_, shape) in enumerate(shapes)), strict=True)
    together, options = _stepped(optimizer, group, parameter, values, list(zip(*grads, strict=True)))
    for value, own, expected in zip(values, grads, together, strict=True):
        (alone,), _ = _stepped(optimizer, group, parameter, [value], [[g] for g in own])
        if not _close(alone, expected, value):
            return False
    _, without = _stepped(optimizer, group, parameter, [], [[]] * _STEPS)
    return options.keys() == without.keys() and all(bool(options[name] == without[name]) for name in options)


def _shapes(group: dict[str, Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """A parameter of each number of dimensions, and its shape or a smaller one."""
    found: dict[int, tuple[Any, tuple[int, ...]]] = {}
    for parameter in sorted(group["params"], key=lambda p: p.numel()):
        if parameter.numel() > 1:
            most = _MOST if parameter.dim() < 3 else 4
            found.setdefault(parameter.dim(), (parameter, tuple(min(n, most) for n in parameter.shape)))
    return list(found.values()) or [(group["params"][0], (4,))]


def _data(shape: tuple[int, ...], number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A value, and a gradient for each step."""
    generator = torch.Generator().manual_seed(number)
    value = torch.randn(shape, generator=generator, device="cpu")
    return value, [torch.randn(shape, generator=generator, device="cpu") * size for size in (1.0, 5.0, 0.2)]


def _stepped(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    like: Any,
    values: Sequence[torch.Tensor],
    grads: Sequence[Sequence[torch.Tensor]],
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """``values`` after a few steps of an optimizer like this one, of which ``group`` is the only group; its options."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed is for GPUs as well, whose streams are not put back
    params = [torch.nn.Parameter(value.clone()) for value in values]
    made = object.__new__(type(optimizer))
    for name, present in vars(optimizer).items():
        if name.endswith("_hooks"):
            made.__dict__[name] = OrderedDict()
        elif name not in ("state", "param_groups", "step"):
            made.__dict__[name] = _on_cpu(present) if _is_simple(present) else present
    options = {k: _on_cpu(v) for k, v in group.items() if k != "params"}
    if isinstance(options.get("lr"), (int, float, torch.Tensor)) and float(options["lr"]) < 1e-2:
        options["lr"] = 1e-2  # a warm-up may start from 0
    for name, neutral in (("capturable", False), ("fused", None)):
        if name in options:
            options[name] = neutral
    made.param_groups, made.state = [{**options, "params": params}], defaultdict(dict)
    for parameter in params:
        for name, given in optimizer.state.get(like, {}).items():  # what the constructor made (Adagrad's)
            filled = isinstance(given, torch.Tensor) and given.shape == like.shape
            made.state[parameter][name] = (
                torch.full_like(parameter, float(given.reshape(-1)[0])) if filled else _on_cpu(given)
            )
    step = inspect.unwrap(type(optimizer).step)
    for own in grads:
        for parameter, grad in zip(params, own, strict=True):
            parameter.grad = grad.clone()
        step(made)
    after = {k: v for k, v in made.param_groups[0].items() if k != "params"}
    return [parameter.detach() for parameter in params], after


def _on_cpu(value: Any) -> Any:
    """A copy, for a trial."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)

    return tree_map(copied, value)


def _close(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> bool:
    change = float((expected - before).abs().max())
    return bool((found - expected).abs().max() <= 1e-3 * change + 1e-6)
