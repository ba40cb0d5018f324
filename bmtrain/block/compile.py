"""torch.compile for blocks and for what is around them, so that gathers and releases stay outside of compiled code."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ..context import context
from ..shard.engine import engine
from .block import Block
from .linear import land_compiled

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile(model: ModuleT, **options: Any) -> ModuleT:
    """Compile every Block of ``model`` in place, and what is outside of them, and return it.

    ``options`` are torch.compile's; of modes that record CUDA graphs the rest is done.  Blocks of one class and equal
    shapes share their compiled code; a block inside another is compiled by itself.  ``fullgraph`` holds for blocks:
    code around them ends where one is called.  On several ranks, what is outside of blocks runs as it is written while
    the first losses are compared.
    """
    mode = options.get("mode")
    if mode in _WITHOUT_GRAPHS and context().device.is_cuda:
        warnings.warn(
            f"bmt.compile leaves out the CUDA graphs of mode={mode!r}: a later run, such as that of the next equal "
            f"block, would write over their results. mode={_WITHOUT_GRAPHS[mode]!r} says so.",
            stacklevel=2,
        )
        options["mode"] = _WITHOUT_GRAPHS[mode]
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks:
        land_compiled(module)
        _compile(module, options)
    if model not in blocks:
        land_compiled(model)
        _compile(model, options | {"fullgraph": False} if blocks else options)
        whole: Any = model
        whole._compiled_call_impl = partial(_run, weakref.ref(whole), whole._compiled_call_impl)
    return model


def _compile(module: nn.Module, options: dict[str, Any]) -> None:
    if type(module).forward.__module__.startswith("torch."):
        # torch.compile leaves frames of torch's own as they are, unless they are called by others (nn.Sequential,
        # nn.TransformerEncoderLayer).
        called: Any = module
        called._compiled_call_impl = torch.compile(_calls(module._call_impl), **options)
    else:
        module.compile(**options)


def _calls(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return run


def _run(reference: weakref.ref[Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    module: Any = reference()
    as_written = torch.is_grad_enabled() and engine().looks_at_losses
    return (module._call_impl if as_written else compiled)(*args, **kwargs)
