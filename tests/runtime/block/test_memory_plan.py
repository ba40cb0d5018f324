"""What is free buys speed and changes no number: units stay whole from step to step, beside a model that is lean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from ranks import on_ranks

import bmtrain as bmt
from bmtrain.block.memory import MemoryPlan
from bmtrain.context import context
from bmtrain.device import Memory
from bmtrain.shard.unit import ShardUnit, State, unit_of_flat

STEPS = 8
GIB = 2**30
PLENTY = Memory(free=64 * GIB, allocated=GIB, total=80 * GIB, peak=2 * GIB)


def fresh_plan(memory: Memory | None) -> MemoryPlan:
    """Let the process's engine forget its plan, and the device say ``memory`` of itself."""
    engine: Any = context().engine
    context().device.stand_in = memory
    engine.plan = engine.outside._plan = MemoryPlan(context())
    return engine.plan  # type: ignore[no-any-return]


def units_of(model: Any) -> list[ShardUnit]:
    return list({id(u): u for u in (unit_of_flat(p._flat) for p in model.parameters())}.values())


def names(recompute: bool | None) -> models.Names:
    made = models.sharded()

    def block(module: Any) -> Any:
        return bmt.Block(module, use_checkpoint=recompute)

    return models.Names(made.Module, made.Parameter, lambda ms: bmt.TransformerBlockList([block(m) for m in ms]), block)


def tokens(step: int, length: int = 8, rows: int = 4) -> torch.Tensor:
    every = torch.randint(0, 31, (bmt.world_size() * rows, length), generator=torch.Generator().manual_seed(step))
    return every.chunk(bmt.world_size())[bmt.rank()]


def loss_of(model: Any, step: int) -> Any:
    return model(tokens(step), tokens(step + 1))


Between = Callable[[Any, Any, int], None]
"""What user code does to a model and its manager before a step."""


def nothing(model: Any, manager: Any, step: int) -> None:
    pass


def writes(model: Any, manager: Any, step: int) -> None:
    """Into parameters outside of the optimizer, in every way."""
    first = next(iter(model.parameters()))
    if step % 3 == 0:
        first.data.mul_(0.75)
    elif step % 3 == 1:
        with torch.no_grad():
            first.add_(0.01)
    else:
        with bmt.gathered(model, write=True):
            for parameter in model.parameters():
                parameter.data.mul_(0.999)


def loads(model: Any, manager: Any, step: int) -> None:
    if step == 4:
        model.saved = ({k: v.clone() for k, v in model.state_dict().items()}, manager.state_dict(gather_opt=True))
    if step == 6:
        model.load_state_dict(model.saved[0])
        manager.load_state_dict(model.saved[1])


def averages(model: Any, manager: Any, step: int) -> None:
    if step == 3:
        model.__dict__["ema"] = copy.deepcopy(model)
    if step > 3:
        with torch.no_grad():
            for kept, parameter in zip(model.ema.parameters(), model.parameters(), strict=True):
                kept.mul_(0.9).add_(parameter, alpha=0.1)
            loss_of(model.ema, step)


def evaluates(model: Any, manager: Any, step: int) -> None:
    with torch.no_grad():
        loss_of(model, step + 100)
        loss_of(model, step + 100)


def freezes(model: Any, manager: Any, step: int) -> None:
    if step == 0:
        for parameter in list(model.parameters())[4:10]:
            parameter.requires_grad_(False)


def trained(memory: Memory | None, between: Between, cast: bool, recompute: bool | None, torchs: bool) -> list[Any]:
    """Losses and final weights of a small GPT, and, last, whether units were whole between steps."""
    plan = fresh_plan(memory)
    torch.manual_seed(3)
    model = models.gpt(names(recompute), layers=2)
    manager = bmt.optim.OptimManager()
    kind: Any = torch.optim.AdamW if torchs else bmt.optim.AdamOptimizer
    manager.add_optimizer(kind(model.parameters(), lr=1e-2))
    losses, stayed = [], False
    for step in range(STEPS):
        between(model, manager, step)
        for micro in range(1 + step % 2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                loss = loss_of(model, 2 * step + micro) / 2
            manager.backward(loss)
            losses.append(float(loss.detach()))
        manager.clip_grad_norm(model.parameters(), 0.5)
        manager.step()
        manager.zero_grad()
        stayed = all(unit.state is State.GATHERING for unit in units_of(model))
    assert not any(unit.is_whole for unit in units_of(model) if unit.moves)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    if "ema" in model.__dict__:
        weights |= {f"ema.{k}": v.clone() for k, v in model.ema.state_dict().items()}
    assert bool(plan._staying) == (memory is not None and units_of(model)[0].moves)
    return [losses, weights, stayed]


@pytest.mark.parametrize("between", [nothing, writes, loads, averages, evaluates, freezes])
@on_ranks(1, 2, 3, timeout=300)
def test_what_stays_changes_no_number(between: Between) -> None:
    cases = [(False, None, False), (True, None, True), (True, False, False), (False, False, True)]
    for cast, recompute, torchs in cases if between is nothing else cases[1:3]:
        lean = trained(None, between, cast, recompute, torchs)
        auto = trained(PLENTY, between, cast, recompute, torchs)
        assert lean[0] == auto[0], (between.__name__, cast, recompute, torchs)
        assert all(torch.equal(lean[1][key], auto[1][key]) for key in lean[1]), (between.__name__, cast, recompute)
        assert not lean[2] and auto[2] == (bmt.world_size() > 1)
    fresh_plan(None)
