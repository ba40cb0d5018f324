"""Whether the first steps have moved buffers otherwise on some ranks than on others."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...alike import differing_ranks, on_all_ranks
from ...context import Context
from ...log import warn
from ...shard.sharded_tensor import ShardedTensor
from ...users_code import users_line

_STEPS = 3
"""At which optimizer step of a model they are compared."""
_MOST = 5  # names in a warning
_MOST_MODELS = 32


def buffers_of(roots: Iterable[nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that every rank has, by name.  Running statistics of norms, which become means, are left out."""
    seen: Counter[str] = Counter()
    for root in roots:
        kind = type(root).__name__
        seen[kind] += 1
        named = kind if seen[kind] == 1 else f"{kind} ({seen[kind]})"
        for path, module in root.named_modules():
            if not isinstance(module, _NormBase):
                for name, buffer in module.named_buffers(recurse=False):
                    if not isinstance(buffer, ShardedTensor) and buffer.layout == torch.strided:
                        yield f"{named}.{path}{'.' if path else ''}{name}", buffer


class FirstBuffers:
    """Those of models that train, compared once: a forward may write into them what its samples have given."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._place = ctx, ""
        self._models: list[weakref.ref[nn.Module]] = []  # whose ids others may have later
        self._beside: list[weakref.ref[nn.Module]] = []  # without parameters, as a loss, which one rank may call alone

    def note(self, model: nn.Module, age: int) -> None:
        """An outermost forward is about to train ``model``, which has made ``age`` steps."""
        if age == _STEPS - 1 and self._ctx.topology.data_size > 1:
            _add(self._models, model)
            self._place = users_line()

    def note_beside(self, model: nn.Module) -> None:
        """One without parameters is called, on this rank."""
        if self._ctx.topology.data_size > 1:
            _add(self._beside, model)

    def optimizer_stepped(self) -> None:
        """Warn of buffers that differ.  Collective if there are models in that step."""
        if not self._models:
            return
        roots = on_all_ranks(self._ctx, [known() for known in self._models], _MOST_MODELS)
        self._models = []
        beside = [model for known in self._beside if (model := known()) is not None]
        # Where ranks have called other losses, those are not compared.
        found = (self._differing(roots) or {}) | (self._differing(beside) or {})
        if found and self._ctx.rank == 0:
            more = " ..." if len(found) > _MOST else ""
            warn(
                f"Ranks have come to different buffers ({self._place}): {', '.join([*found][:_MOST])}{more}. Forwards "
                "have written into them what each rank's own samples gave; a checkpoint holds rank 0's. Write what all "
                "of them gave: bmt.distributed.all_reduce(value, 'avg'), or 'sum'.",
                stacklevel=2,
            )

    def _differing(self, roots: Iterable[nn.Module]) -> dict[str, list[int]] | None:
        return differing_ranks(self._ctx, {name: (b, ("replicate", "shard")) for name, b in buffers_of(roots)})


def _add(models: list[weakref.ref[nn.Module]], model: nn.Module) -> None:
    if len(models) < _MOST_MODELS and not any(known() is model for known in models):
        models.append(weakref.ref(model))
