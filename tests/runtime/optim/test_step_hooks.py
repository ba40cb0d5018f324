"""Hooks of ``optimizer.step()`` are called in torch's order, as often, and see whole values, wherever registered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from test_adam_view import build
from test_shown_state import managed, step_of_torch, train
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import UnsupportedError


@contextmanager
def global_hooks(before: Any, after: Any) -> Iterator[None]:
    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Inherits(torch.optim.SGD):
    """Steps by the class that it derives from, for which torch calls hooks, too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Holds(torch.optim.Optimizer):
    """Steps twice by an optimizer of its own, as SAM does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.base.step()


KINDS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW, "Muon": torch.optim.Muon, "Inherits": Inherits, "Holds": Holds,
}  # fmt: skip


def seen_by(trained: Any, kind: str, sharded: bool) -> list[Any]:
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # from the first one on torch calls hooks for its class
    matrices = [p for p in trained.parameters() if p.dim() == 2]
    options = {"eps": 1e-4} if kind == "AdamW" else {}
    optimizer = KINDS[kind](matrices, lr=1e-2, **options)
    found: list[Any] = []

    def hook(name: str) -> Any:
        def call(which: Any, args: Any, kwargs: Any) -> None:
            assert args[0] is which
            found.append((name, type(which).__name__, len(args), len(kwargs)))
            found.extend(float(value) for p in matrices for value in (p.detach().norm(), p.grad.norm(), p.shape[1]))
            if kind == "AdamW":
                found.extend(float(state["exp_avg"].abs().sum()) for state in optimizer.state.values())

        return call

    optimizer.register_step_pre_hook(hook("own, before"))
    optimizer.register_step_post_hook(hook("own, after"))
    manager = managed(optimizer) if sharded else None
    with global_hooks(hook("before"), hook("after")):
        for step in range(2):
            train(trained, manager, step) if manager else step_of_torch(optimizer, trained, step)
    return found


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", list(KINDS))
def test_hooks_are_called_as_in_torch(kind: str) -> None:
    plain, model = build().to(context().device.torch_device), bmt.BMTrainModelWrapper(build())
    theirs, ours = seen_by(plain, kind, False), seen_by(model, kind, True)
    assert [one for one in ours if isinstance(one, tuple)] == [one for one in theirs if isinstance(one, tuple)]
    numbers = [[one for one in those if isinstance(one, float)] for those in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_hooks_may_change_arguments_and_be_removed() -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    manager, found = managed(optimizer), list[Any]()

    def gives_a_closure(which: Any, args: Any, kwargs: Any) -> Any:
        handle.remove()
        return (which, lambda: found.append("closure")), {}

    handle = register_optimizer_step_pre_hook(gives_a_closure)
    last = optimizer.register_step_post_hook(lambda which, args, kwargs: found.append(len(args)))
    train(model, manager)
    train(model, manager)
    assert found == ["closure", 2, 1]
    last.remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@on_ranks(1, 2)
def test_a_step_that_raises_leaves_the_hooks() -> None:
    model, found = bmt.BMTrainModelWrapper(build()), list[str]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    manager = managed(optimizer)
    optimizer.register_step_post_hook(lambda *_: found.append("own"))

    def fails() -> None:
        raise KeyError("closure")

    with global_hooks(lambda *_: found.append("before"), lambda *_: found.append("after")):
        with pytest.raises(KeyError):
            optimizer.step(fails)
        train(model, manager)
    assert found == ["before", "before", "own", "after"]


@on_ranks(2)
def test_hooks_of_an_optimizer_inside_another_are_refused() -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = Holds(model.parameters(), lr=1e-2)
    optimizer.base.register_step_post_hook(lambda *_: None)
    manager = managed(optimizer)
    with pytest.raises(UnsupportedError, match="outer optimizer"):
        train(model, manager)


@on_ranks(1, 2)
def test_global_hooks_of_an_adam_optimizer_see_whole_values() -> None:
    model, found = bmt.BMTrainModelWrapper(build()), list[Any]()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager = managed(optimizer)

    def look(which: Any, *_: Any) -> None:
        found.append((len(which.state), [tuple(p.shape) for p in model.parameters()], float(model[0].weight.sum())))

    with global_hooks(look, look):
        before = float(model[0].weight.sum())
        train(model, manager)
    shapes = [tuple(p.shape) for p in build().parameters()]
    assert [one[:2] for one in found] == [(0, shapes), (4, shapes)]
    assert found[0][2] == before and found[1][2] == float(model[0].weight.sum())
