"""Whether the first steps have moved buffers otherwise on some ranks than on others."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...alike import differing_ranks, on_all_ranks
from ...context import Context
from ...shard.sharded_tensor import ShardedTensor
from ...users_code import users_line

_STEPS = 3
"""At which optimizer step of a model they are compared."""
_MOST = 5  # names in a warning
_MOST_MODELS = 32


def buffers_of(roots: Iterable[nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that every rank has, by name.  Running statistics of norms, which become means, are left out."""
    for root in roots:
        for path, module in root.named_modules():
            if not isinstance(module, _NormBase):
                for name, buffer in module.named_buffers(recurse=False):
                    if not isinstance(buffer, ShardedTensor) and buffer.layout == torch.strided:
                        yield f"{type(root).__name__}.{path}{'.' if path else ''}{name}", buffer


class FirstBuffers:
    """Those of models that train, compared once: a forward may write into them what its samples have given."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._place = ctx, ""
        self._models: list[weakref.ref[nn.Module]] = []  # whose ids others may have later

    def note(self, model: nn.Module, age: int) -> None:
        """An outermost forward is about to train ``model``, which has made ``age`` steps."""
        if age != _STEPS - 1 or self._ctx.topology.data_size == 1:
            return
        if len(self._models) < _MOST_MODELS and not any(known() is model for known in self._models):
            self._models.append(weakref.ref(model))
        self._place = users_line()

    def optimizer_stepped(self) -> None:
        """Warn of buffers that differ.  Collective if there are models in that step."""
        if not self._models:
            return
        roots = on_all_ranks(self._ctx, [known() for known in self._models], _MOST_MODELS)
        self._models = []
        found = differing_ranks(self._ctx, {name: (b, ("replicate", "shard")) for name, b in buffers_of(roots)})
        if found and self._ctx.rank == 0:
            more = " ..." if len(found) > _MOST else ""
            warnings.warn(
                f"Ranks have come to different buffers ({self._place}): {', '.join([*found][:_MOST])}{more}. Forwards "
                "have written into them what each rank's own samples gave; a checkpoint holds rank 0's. Write what all "
                "of them gave: bmt.distributed.all_reduce(value, 'avg'), or 'sum'.",
                stacklevel=2,
            )
