"""What user code does to a model between its steps and amid one, in a small training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import torch
from fresh import fresh_plan

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.device import Memory
from bmtrain.precision import Precision, as_precision
from bmtrain.shard.unit import ShardUnit, State, unit_of_flat


def kind() -> str:
    return context().device.torch_device.type


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


def converts(model: Any, manager: Any, step: int) -> None:
    if step == 4:
        model.bfloat16()
        dtypes = {parameter.dtype for parameter in model.parameters()}
        assert dtypes == {torch.bfloat16}
        with torch.no_grad(), bmt.gathered(model):
            assert {parameter.data.dtype for parameter in model.parameters()} == dtypes


BETWEEN = [writes, loads, averages, evaluates, freezes, converts]


Amid = Callable[[Any, Any, Any], Any]
"""What user code does between a forward and its backward; returns the loss to go on with."""


def goes_on(model: Any, manager: Any, loss: Any) -> Any:
    return loss


def evaluates_otherwise(model: Any, manager: Any, loss: Any) -> Any:
    with torch.no_grad(), torch.autocast(kind(), enabled=False):
        loss_of(model, 200)
    return loss


def writes_amid(model: Any, manager: Any, loss: Any) -> Any:
    for parameter in list(model.parameters())[::2]:
        parameter.data.mul_(1.5)
    return loss


def writes_whole_amid(model: Any, manager: Any, loss: Any) -> Any:
    with bmt.gathered(model, write=True):
        for parameter in model.parameters():
            parameter.data.mul_(0.75)
    return loss


def computes_twice(model: Any, manager: Any, loss: Any) -> Any:
    with torch.autocast(kind(), dtype=torch.bfloat16):
        return loss + loss_of(model, 300)


def goes_back_twice(model: Any, manager: Any, loss: Any) -> Any:
    loss.backward(retain_graph=True)
    return loss


def penalizes(model: Any, manager: Any, loss: Any) -> Any:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = loss_of(model, 300)
    slopes = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)
    return loss + 0.1 * sum(slope.square().sum() for slope in slopes)


AMID = [evaluates_otherwise, writes_amid, writes_whole_amid, computes_twice, goes_back_twice, penalizes]


def trained(
    memory: Memory | None,
    between: Between,
    steps: int,
    precision: str,
    recompute: bool | None = None,
    own: bool = True,
    amid: Amid = goes_on,
    forget: Callable[[Memory | None], object] = fresh_plan,
) -> list[Any]:
    """Losses and final weights of a small GPT, and, last, whether units were whole between steps."""
    context().memory = "lean" if memory is None else "auto"  # a GPU would say of itself what it has
    forget(memory)
    torch.manual_seed(3)
    context().precision = as_precision(precision if precision in ("bf16", "fp16") else None)
    model = models.gpt(names(recompute), layers=2, width=8)
    context().precision = Precision()
    manager = bmt.optim.OptimManager(loss_scale=2.0**8 if precision == "fp16" else None)
    optimizer: Any = bmt.optim.AdamOptimizer if own else torch.optim.AdamW
    manager.add_optimizer(optimizer(model.parameters(), lr=1e-2))
    losses, stayed = [], False
    for step in range(steps):
        between(model, manager, step)
        for micro in range(1 + (step % 4 == 1)):
            with torch.autocast(kind(), dtype=torch.bfloat16, enabled=precision == "autocast"):
                loss = loss_of(model, 2 * step + micro) / 2
            loss = amid(model, manager, loss)
            manager.backward(loss)
            losses.append(float(loss.detach()))
        manager.clip_grad_norm(model.parameters(), 0.5)
        manager.step()
        manager.zero_grad()
        moving = [unit for unit in units_of(model) if unit.moves]
        stayed = bool(moving) and all(unit.state is State.GATHERING for unit in moving)
    assert not any(unit.is_whole for unit in moving)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    if "ema" in model.__dict__:
        weights |= {f"ema.{k}": v.clone() for k, v in model.ema.state_dict().items()}
    assert {unit.stays for unit in moving} <= {memory is not None}
    return [losses, weights, stayed]
