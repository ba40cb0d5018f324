"""A stand-in for bmtrain's module classes with their documented meaning, so that converted models run without ranks."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import nn


class DistributedModule(nn.Module):
    pass


class DistributedParameter(nn.Parameter):
    pass


def CheckpointBlock(module: nn.Module, use_checkpoint: bool = True) -> nn.Module:
    return module


class TransformerBlockList(nn.ModuleList):
    def __init__(self, modules: Iterable[nn.Module] = (), num_hidden: int = 1, use_checkpoint: bool = True) -> None:
        super().__init__(modules)
        self.num_hidden = num_hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, extra = args[: self.num_hidden], args[self.num_hidden :]
        assert len(hidden) == self.num_hidden
        for block in self:
            out = block(*hidden, *extra, **kwargs)
            hidden = (out,) if self.num_hidden == 1 else tuple(out)
            assert len(hidden) == self.num_hidden
        return hidden[0] if self.num_hidden == 1 else hidden


def module() -> types.ModuleType:
    made = types.ModuleType("bmtrain")
    for item in (DistributedModule, DistributedParameter, CheckpointBlock, TransformerBlockList):
        setattr(made, item.__name__, item)
    return made
