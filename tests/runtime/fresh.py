"""An engine that has planned and recorded nothing yet, in a process that has run other models."""

from __future__ import annotations

from typing import Any

from bmtrain.block.graphs.blocks import Graphs
from bmtrain.block.memory import MemoryPlan
from bmtrain.context import context
from bmtrain.device import Memory

GIB = 2**30


def memory_of(free: float) -> Memory:
    """A step takes one GiB for a while; of what is free beside that, 3.2 GiB are left alone."""
    return Memory(free=int((free + 1 + 3.2) * GIB), allocated=GIB, total=80 * GIB, peak=2 * GIB)


PLENTY = memory_of(60)


def fresh_plan(memory: Memory | None) -> MemoryPlan:
    """Let the process's engine forget its plan, and the device say ``memory`` of itself."""
    engine: Any = context().engine
    context().device.stand_in = memory
    engine.plan = engine.outside._plan = MemoryPlan(context())
    return engine.plan  # type: ignore[no-any-return]


def fresh_graphs(memory: Memory | None, graphs: bool, automatic: bool = False) -> Any:
    """Let the process's engine forget what it has planned and recorded, and record if ``graphs``."""
    engine: Any = context().engine
    made = fresh_plan(memory)
    engine.graphs = Graphs(context(), made, engine.first_losses) if graphs else None
    if graphs:
        engine.graphs.is_on, engine.graphs.is_automatic = True, automatic
    context().diary.step = 0
    return engine.graphs
