"""torch.compile, a block at a time, so that gathers and releases stay outside the compiled code."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .block import Block
from .linear import land_compiled

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def compile(model: ModuleT, **options: Any) -> ModuleT:
    """Compile every Block of ``model`` in place, and what is outside of them, and return it.

    ``options`` are torch.compile's.  Blocks of one class and equal shapes share their compiled code; a block inside
    another is compiled by itself.  ``fullgraph`` holds for blocks: code around them ends where one is called.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks:
        land_compiled(module)
        module.compile(**options)
    if model not in blocks:
        land_compiled(model)
        model.compile(**(options | {"fullgraph": False} if blocks else options))
    return model
