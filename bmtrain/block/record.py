"""What the library keeps on a module that owns a unit."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..precision import Precision
from ..shard.unit import ShardUnit
from .state import State


@dataclass
class Record:
    """Stands in the module's ``__dict__`` under ``_bmt``.

    Attributes:
        unit: the parameters that the module makes whole; None until it is sharded.
        is_block: whether the module is a Block.
        pipes: whether it is a Block of a pipeline of several stages.
        stage: in which of them it runs; None until that is known, and outside of pipelines.
        recompute, zero_level, precision: what ``Block`` was told.
        has_statistics: whether there are running statistics to level among the ranks; None until that was looked up.
        trained: whether they have moved since the ranks last had the same.
        has_blocks: whether a module inside owns a unit too.
        inlined: whether compiled code that calls the module takes it in, as one call of many, without the engine.
        keeps: whether it may do so while gradients are computed, too, as the module's activations are kept.
        draws_checked: whether every random number was drawn from the right stream (``SplitRandom``).
        state: what of its own the module's forward moves, so that a second run starts where the first did.
    """

    unit: ShardUnit | None = None
    is_block: bool = False
    pipes: bool = False
    stage: int | None = None
    recompute: bool | None = False
    zero_level: int | None = None
    precision: Precision | None = None
    has_statistics: bool | None = None
    trained: bool = False
    has_blocks: bool = False
    inlined: bool = False
    keeps: bool = False
    draws_checked: bool = False
    state: State = field(default_factory=State)

    @property
    def keep(self) -> bool | None:
        """As the unit's.  A stage runs its blocks once for every micro-batch, and gathers them once."""
        if self.stage is not None:
            return True
        return None if self.zero_level is None else self.zero_level == 2

    def settings(self) -> Record:
        """What is worth keeping in a file."""
        return Record(recompute=self.recompute, zero_level=self.zero_level, precision=self.precision)


def record_of(module: nn.Module) -> Record | None:
    """The module's record, if it has one."""
    return module.__dict__.get("_bmt")


def unit_of(module: nn.Module) -> ShardUnit | None:
    """The unit that ``module`` owns, if it owns one and is sharded."""
    record = module.__dict__.get("_bmt")
    return None if record is None else record.unit


def has_hooks(module: nn.Module) -> bool:
    """Whether user code is called before or after the module's forward or backward."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )
