"""torch.compile, a block at a time, so that gathers and releases stay outside the compiled code."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .block import Block
from .linear import land_compiled

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def compile(model: ModuleT, **options: Any) -> ModuleT:
    """Compile every Block of ``model`` in place (the whole model if it has none) and return it.

    ``options`` are torch.compile's.  Blocks of one class and equal shapes share their compiled code; a block inside
    another is compiled by itself.
    """
    chosen: list[nn.Module] = [m for m in model.modules() if isinstance(m, Block)] or [model]
    for module in chosen:
        land_compiled(module)
        module.compile(**options)
    return model
