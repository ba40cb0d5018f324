"""Sharding a model that was written without this library."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..context import context
from ..shard.engine import engine
from .block import Block
from .block_list import TransformerBlockList
from .sharded import ShardedModule, become

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def BMTrainModelWrapper(model: ModuleT) -> ModuleT:
    """Shard an ordinary model in place and return it.

    Every ``nn.ModuleList`` of two or more modules of one class, at the outermost level, becomes a TransformerBlockList.
    Parameters added to a model after it was sharded are sharded by calling this again.  In a constructor of a
    DistributedModule it is sharded with the whole.
    """
    ctx = context()
    ctx.building += 1
    try:
        _find_stacks(model)
    finally:
        ctx.building -= 1
    if ctx.building:
        become(model, ShardedModule)
    else:
        engine().shard(model)
    return model


def _find_stacks(module: nn.Module) -> None:
    for child in module.children():
        if isinstance(child, Block):
            continue
        if type(child) is nn.ModuleList and _is_stack(child):
            elements = list(child)
            child.__class__ = TransformerBlockList
            for index, element in enumerate(elements):
                child[index] = element  # becomes a Block
        else:
            _find_stacks(child)


def _is_stack(candidates: nn.ModuleList) -> bool:
    return (
        len(candidates) > 1
        and len({type(m) for m in candidates}) == 1
        and all(any(True for _ in m.children()) and any(True for _ in m.parameters()) for m in candidates)
    )
