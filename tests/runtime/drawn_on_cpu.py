"""Lets tests that were written for a CPU run on another device: the same random numbers, and results that compare."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

from bmtrain.shard.parameter import DistributedParameter

_MADE = ["rand", "randn", "randint", "randperm", "normal"]
_FILLED = ["normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"]
_COMPARED = ["equal", "allclose", "isclose"]
_WHOLE = (torch.Tensor, torch.nn.Parameter, DistributedParameter)


@contextmanager
def drawn_on_cpu() -> Iterator[None]:
    """What is drawn comes from the CPU's generator, so that a model begins as its reference on a CPU does.

    Numbers that are drawn like a tensor (dropout, ``randn_like``), or into what is sharded, stay its device's.  No
    function mode: compiled code would be other code under one.
    """
    with ExitStack() as stack:
        for name in _MADE:
            stack.enter_context(mock.patch.object(torch, name, _made(getattr(torch, name))))
        for name in _FILLED:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _filled(getattr(torch.Tensor, name))))
        yield


@contextmanager
def compared_across_devices() -> Iterator[None]:
    """A state dict, which is on the CPU, compares with a reference."""
    with ExitStack() as stack:
        for name in _COMPARED:
            stack.enter_context(mock.patch.object(torch, name, _compared(getattr(torch, name))))
        close = functools.partial(torch.testing.assert_close, check_device=False)
        stack.enter_context(mock.patch.object(torch.testing, "assert_close", close))
        yield


def _made(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def on_cpu(*args: Any, generator: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        if {"device", "out"} & kwargs.keys() or (generator is not None and generator.device.type != "cpu"):
            return make(*args, generator=generator, requires_grad=requires_grad, **kwargs)
        if any(isinstance(one, torch.Tensor) for one in (*args, *kwargs.values())):  # torch.normal of tensors
            return make(*args, generator=generator, **kwargs)
        made = make(*args, generator=generator, **kwargs, device="cpu")
        made = made.to(torch.get_default_device())
        return made.requires_grad_() if requires_grad else made  # torch.func allows no call of it

    return on_cpu


def _filled(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(fill)
    def from_cpu(self: torch.Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> torch.Tensor:
        own = generator is not None and generator.device.type != "cpu"
        if type(self) not in _WHOLE or self.device.type == "cpu" or own:
            return fill(self, *args, generator=generator, **kwargs)
        drawn = fill(torch.empty(self.shape, dtype=self.dtype, device="cpu"), *args, generator=generator, **kwargs)
        with torch.no_grad():
            return self.copy_(drawn)

    return from_cpu


def _compared(compare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compare)
    def on_one_device(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return compare(a.to(b.device) if a.device != b.device else a, b, *args, **kwargs)

    return on_one_device


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
