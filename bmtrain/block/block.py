"""Block: a module gathered, run and released as one piece, and recomputed in the backward if asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..context import context
from ..errors import ConfigurationError
from ..precision import Precision, as_precision
from ..shard.engine import engine
from .published_block import PublishedBlock
from .record import record_of, unit_of
from .sharded import ShardedModule, become


class Block(ShardedModule):
    """Make ``inner_module`` a unit of its own: whole only while it runs.

    ``Block(m)`` returns ``m`` itself.  It stays an instance of its class; attributes, hooks, keyword arguments, results
    of any type and state-dict keys are as before, and ``isinstance(m, Block)`` becomes true.

    Args:
        inner_module: any module; None, a place without a module in an ``nn.ModuleList``, stays None.
        use_checkpoint: True drops activations in the forward and computes them again in the backward, False keeps them,
            None does either as memory allows (see ``bmtrain.block.memory``).  The numbers are the same.
        zero_level: 3 releases whole parameters after the forward, 2 keeps them until the backward is over, None does
            either, or lets them stay from step to step, as memory allows.
        initialized: accepted for older scripts; parameters keep their values either way.
        mode: "BLOCK", or "PIPE" for an element of a ``bmt.PipelineTransformerBlockList``; the same without
            ``pipe_size``.
        precision: the block's own bmt.Precision, or the dtype to compute in ("bf16", torch.bfloat16); None leaves the
            one it has, at first that of ``init_distributed``.
    """

    last_bases = (PublishedBlock,)

    def __new__(
        cls,
        inner_module: object = ...,
        use_checkpoint: bool | None = None,
        zero_level: int | None = None,
        initialized: bool = False,
        mode: str = "BLOCK",
        precision: Precision | torch.dtype | str | None = None,
        **kwargs: object,
    ) -> Any:
        if cls is not Block:  # type(block)(...): an ordinary new module of the inner class
            return super().__new__(cls)
        if inner_module is None:
            return None
        if not isinstance(inner_module, nn.Module):
            raise ConfigurationError(f"bmt.Block takes a torch.nn.Module, not {type(inner_module).__name__}.")
        if zero_level not in (None, 2, 3):
            raise ConfigurationError(f"zero_level must be 2 or 3, not {zero_level}.")
        if mode not in ("BLOCK", "PIPE"):
            raise ConfigurationError(f'mode must be "BLOCK" or "PIPE", not {mode!r}.')
        ctx = context()
        if mode == "PIPE" and ctx.topology.pipe_size > 1:
            _refuse_sharded(inner_module)
        policy = None if precision is None else as_precision(precision)
        record = become(inner_module, Block)
        record.is_block = True
        record.recompute = None if use_checkpoint is None else bool(use_checkpoint)
        if use_checkpoint is None and getattr(inner_module, "inplace", False):
            record.recompute = False  # ReLU(inplace=True) in a list of layers: its input is gone when it has run
        record.zero_level, record.pipes = zero_level, mode == "PIPE" and ctx.topology.pipe_size > 1
        if policy is not None:
            record.precision = policy
        if record.unit is not None:
            record.unit.keep, record.unit.is_block = record.keep, True
            if policy is not None:
                record.unit.change_precision(policy)
        elif not ctx.building and not record.pipes:  # those the list of the pipeline shards
            engine().shard(inner_module)
        return inner_module

    def __init__(self, *args: object, **kwargs: object) -> None:
        # Python calls this on what __new__ returned: nothing is left to do for a Block made of an existing module.
        if record_of(self) is None:
            super().__init__(*args, **kwargs)


def _refuse_sharded(module: nn.Module) -> None:
    """Raise ConfigurationError if any of ``module`` is sharded over all ranks already."""
    for name, inner in module.named_modules():
        if unit_of(inner) is not None:
            raise ConfigurationError(
                f'bmt.Block({type(module).__name__}, mode="PIPE"): {name or "it"} is sharded over all ranks already, '
                "as a Block or DistributedModule of its own, while a stage keeps its blocks for itself. Make it inside "
                "the constructor of a bmt.DistributedModule that holds the whole model."
            )


CheckpointBlock = Block
"""The name older scripts use."""
