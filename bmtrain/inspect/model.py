"""Statistics of parameters and their gradients."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch

from ..shard import gather_grad, gathered
from .moments import Moments


@torch.no_grad()
def inspect_model(model: torch.nn.Module, param_name: str, prefix: str = "") -> list[dict[str, Any]]:
    """Statistics of every parameter whose name matches, in the order of ``named_parameters``.  Collective.

    Args:
        model: the module to look into.
        param_name: a pattern such as ``"*.attention.*"`` for the whole name, ``prefix`` included.
        prefix: put before every name.

    Returns one dict for each parameter with its ``name``, whole ``shape`` and the floats ``std``, ``mean``, ``max``,
    ``min``, ``grad_std``, ``grad_mean``; the last two are 0.0 for a parameter without gradient.
    """
    return [
        _describe(prefix + name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if fnmatch.fnmatchcase(prefix + name, param_name)
    ]


def _describe(name: str, parameter: torch.nn.Parameter) -> dict[str, Any]:
    with gathered(parameter):
        values = Moments.of(parameter)
    whole_grad = gather_grad(parameter)
    grad = Moments.of(whole_grad)
    return {
        "name": name,
        "shape": tuple(parameter.shape),
        "std": values.std,
        "mean": values.mean,
        "max": values.max,
        "min": values.min,
        "grad_std": grad.std if grad.count else 0.0,
        "grad_mean": grad.mean if grad.count else 0.0,
    }
