"""torch.compile, a block at a time, so that gathers and releases stay outside the compiled code."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .block import Block
from .linear import land_compiled
from .sharded import ShardedModule

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def compile(model: ModuleT, **options: Any) -> ModuleT:
    """Compile every Block of ``model`` in place (the whole model if it has none) and return it.

    ``options`` are torch.compile's.  Blocks of one class and equal shapes share their compiled code.
    """
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    outermost = [b for b in blocks if not any(b is not other and b in set(other.modules()) for other in blocks)]
    chosen: list[nn.Module] = [*outermost] or [model]
    for module in chosen:
        assert isinstance(module, ShardedModule) or not blocks
        land_compiled(module)
        module.compile(**options)
    return model
