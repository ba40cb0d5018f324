"""Learning rates over time."""

from __future__ import annotations

import copy
import math

import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

from .registry import idiom
from .user import User


def _rates(k: User, make, steps: int = 4, momentum: float = 0.0):
    """Training with a schedule that is stepped by hand."""
    model, rates = k.net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    manager, schedule = k.manage(optimizer), make(optimizer)
    for x, y in k.batches(steps):
        k.step(manager, F.cross_entropy(model(x), y))
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return {"rates": rates, "weights": k.weights(model)}


@idiom
def step(k: User):
    """`StepLR`"""
    return _rates(k, lambda o: schedules.StepLR(o, 2, 0.5))


@idiom
def cosine(k: User):
    """`CosineAnnealingLR`"""
    return _rates(k, lambda o: schedules.CosineAnnealingLR(o, 4))


@idiom
def one_cycle(k: User):
    """`OneCycleLR`, which moves the momentum too"""
    return _rates(k, lambda o: schedules.OneCycleLR(o, 0.2, total_steps=6), momentum=0.9)


@idiom
def warm_up(k: User):
    """`LambdaLR`: warm-up, then cosine"""
    return _rates(
        k, lambda o: schedules.LambdaLR(o, lambda s: (s + 1) / 2 if s < 2 else 0.5 * (1 + math.cos(math.pi * s / 6)))
    )


@idiom
def one_after_the_other(k: User):
    """`SequentialLR`"""
    return _rates(
        k, lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o, 0.1, 1, 2), schedules.ExponentialLR(o, 0.9)], [2])
    )


@idiom
def plateau(k: User):
    """`ReduceLROnPlateau` with the mean loss"""
    model, rates = k.net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager, schedule = k.manage(optimizer), schedules.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
    for x, y in k.batches(5):
        k.step(manager, F.cross_entropy(model(x), y))
        schedule.step(k.losses[-1])
        rates.append(optimizer.param_groups[0]["lr"])
    return {"rates": rates, "weights": k.weights(model)}


@idiom
def managed(k: User):
    """The manager steps the schedule"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    k.train(model, k.manage(optimizer, scheduler=schedules.ExponentialLR(optimizer, 0.5)))
    return {"rate": optimizer.param_groups[0]["lr"], "weights": k.weights(model)}


@idiom
def groups(k: User):
    """`LambdaLR` with a function for each group"""
    model = k.net()
    optimizer = torch.optim.SGD([{"params": model.layers.parameters()}, {"params": model.head.parameters()}], lr=0.1)
    schedule = schedules.LambdaLR(optimizer, [lambda s: 0.5**s, lambda s: 1.0])
    for _ in k.after_backward(model, k.manage(optimizer)):
        schedule.step()
    return {"rates": schedule.get_last_lr(), "weights": k.weights(model)}


@idiom
def saved(k: User):
    """A schedule's state goes into another"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager, schedule = k.manage(optimizer), schedules.StepLR(optimizer, 1, 0.5)
    for _ in k.after_backward(model, manager):
        schedule.step()
    again = schedules.StepLR(optimizer, 1, 0.5)
    again.load_state_dict(copy.deepcopy(schedule.state_dict()))
    again.step()
    return {"rate": again.get_last_lr()}


@idiom
def found_by_range_test(k: User):
    """A learning-rate finder: the rate grows, then weights and optimizer are put back"""
    model, seen = k.net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    manager = k.manage(optimizer)
    start, first = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for x, y in k.batches(4):
        k.step(manager, F.cross_entropy(model(x), y))
        seen.append((optimizer.param_groups[0]["lr"], k.losses[-1]))
        optimizer.param_groups[0]["lr"] *= 5
    model.load_state_dict(start)
    optimizer.load_state_dict(first)
    k.train(model, manager)
    return {"seen": seen, "weights": k.weights(model)}
