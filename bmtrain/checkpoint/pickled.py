"""Whole models in files: ``torch.save(model, path)`` for models in shares.

A sharded module is pickled as an instance of its own class with whole, ordinary parameters. Where it is read after
``init_distributed`` it is sharded again, its blocks with it; elsewhere it stays an ordinary module.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..block.block import Block
from ..block.linear import LandingLinear
from ..block.record import Record, record_of
from ..block.sharded import ShardedModule
from ..block.state import state_for_pickle
from ..context import context, is_initialized
from ..errors import UnsupportedError
from ..shard.engine import engine
from ..shard.gathered import gathered
from ..shard.parameter import DistributedParameter, split_of
from ..shard.sharded_tensor import ShardedTensor, unsliced


class Pickler(pickle.Pickler):
    """Writes sharded modules as ordinary ones; while it runs, their parameters must be whole."""

    def reducer_override(self, obj: Any) -> Any:
        """How to pickle ``obj``, if not as usual."""
        if isinstance(obj, DistributedParameter):
            return torch._utils._rebuild_parameter, (obj.detach().clone(), obj.requires_grad, {})
        if not isinstance(obj, (ShardedModule, LandingLinear)):
            return NotImplemented
        own = next(c for c in type(obj).__mro__ if not issubclass(c, (ShardedModule, LandingLinear)))
        state = {key: value for key, value in state_for_pickle(obj).items() if key not in ("_bmt", "lands_compiled")}
        record = record_of(obj)
        if record is not None:
            state["_bmt_was"] = (isinstance(obj, Block), record.settings())
        return make, (own,), state, None, None, restore


def make(own: type[nn.Module]) -> nn.Module:
    """An instance without state."""
    return own.__new__(own)


def restore(module: nn.Module, state: dict[str, Any]) -> None:
    """Set the state of a module that was just made; a whole model is sharded, if this process is part of a job."""
    outermost = state.pop("_bmt_outermost", False)
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    if not outermost:
        return
    was = [(inner, inner.__dict__.pop("_bmt_was", (False, Record()))) for inner in module.modules()]
    if not is_initialized():
        return
    ctx = context()
    ctx.building += 1
    try:
        for inner, (is_block, kept) in was:
            if is_block:
                Block(inner, kept.recompute, kept.zero_level, precision=kept.precision)
    finally:
        ctx.building -= 1
    engine().shard(module)


@contextmanager
def whole(obj: Any) -> Iterator[bool]:
    """Gather the models in ``obj``, its dicts, lists and tuples; gives whether there are any.  Collective if so."""
    models = list(_models(obj))
    if any(split_of(parameter) is not None for model in models for parameter in model.parameters()):
        raise UnsupportedError(
            "A model of which tensor-parallel ranks have slices cannot be pickled. Save its state dict: "
            "bmt.save(model, path), or bmt.save_checkpoint(model.state_dict(), path)."
        )
    with gathered([parameter for model in models for parameter in model.parameters()]):
        for model in models:
            model.__dict__["_bmt_outermost"] = True
        try:
            yield bool(models)
        finally:
            for model in models:
                model.__dict__.pop("_bmt_outermost", None)


def _models(obj: Any) -> Iterator[nn.Module]:
    if isinstance(obj, nn.Module):
        if any(isinstance(parameter, DistributedParameter) for parameter in obj.parameters()):
            yield obj
    elif isinstance(obj, (dict, list, tuple)):
        items: Iterable[Any] = obj.values() if isinstance(obj, dict) else obj
        for item in items:
            yield from _models(item)


def with_whole_tensors(obj: Any) -> Any:
    """``obj`` with every ShardedTensor in its dicts, lists and tuples gathered, on the CPU.  Collective if any is."""
    return _joined(obj, {})


def _joined(obj: Any, known: dict[int, torch.Tensor]) -> Any:
    if isinstance(obj, ShardedTensor):
        if id(obj) not in known:
            known[id(obj)] = unsliced(obj).cpu()
        return known[id(obj)]
    if isinstance(obj, dict):
        changed = {key: made for key, value in obj.items() if (made := _joined(value, known)) is not value}
        if changed:
            obj = copy.copy(obj)
            obj.update(changed)
    elif isinstance(obj, (list, tuple)):
        items = [_joined(value, known) for value in obj]
        if any(made is not value for made, value in zip(items, obj, strict=True)):
            obj = type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
    return obj
