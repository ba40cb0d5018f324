"""Lets tests that were written for a CPU run on another device: the same random numbers, and results that compare."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from bmtrain.shard.parameter import DistributedParameter

_MADE = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}
_FILLED = {
    torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_, torch.Tensor.random_,
    torch.Tensor.exponential_, torch.Tensor.log_normal_, torch.Tensor.cauchy_, torch.Tensor.geometric_,
}  # fmt: skip


_COMPARED = {torch.equal, torch.allclose, torch.isclose}
_WHOLE = (torch.Tensor, torch.nn.Parameter, DistributedParameter)


class DrawnOnCPU(TorchFunctionMode):
    """What is drawn comes from the CPU's generator, so that a model begins as its reference on a CPU does.

    Numbers that are drawn like a tensor (dropout, ``randn_like``) stay its device's. A state dict, which is on the CPU,
    compares with a reference.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = torch.get_default_device()
        generator = kwargs.get("generator")
        if (
            func in _MADE
            and not {"device", "out"} & kwargs.keys()
            and (generator is None or generator.device.type == "cpu")
        ):
            grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs, device="cpu").to(device).requires_grad_(grad)
        if func in _FILLED and type(args[0]) in _WHOLE and args[0].device.type != "cpu" and generator is None:
            drawn = func(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs)
            with torch.no_grad():
                return args[0].copy_(drawn)
        if func in _COMPARED and args[0].device != args[1].device:
            args = (args[0].to(args[1].device), *args[1:])
        return func(*args, **kwargs)


class _ToCPU(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.device.type == "cuda":
            return obj.detach().cpu().requires_grad_(obj.requires_grad).__reduce_ex__(2)
        return NotImplemented


def dumps_on_cpu(value: Any) -> bytes:
    """``value``, pickled; tensors on a GPU as a CPU's, to be compared in the process that started the ranks."""
    out = io.BytesIO()
    _ToCPU(out).dump(value)
    return out.getvalue()


def on_default_device(value: Any) -> Any:
    """The tensors in ``value`` where new tensors are made."""
    device = torch.get_default_device()
    if device.type == "cpu":
        return value
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)
