"""The first steps of each model are looked at, whenever it comes to train; the steps after them are not."""

from __future__ import annotations

import os
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt
from bmtrain.context import context

WORDS = {
    "counts": "different counts", "sum": "is not a mean over", "across": "samples of a batch", "draws": "own_random",
    "hosts": "numpy or Python's random", "batches": "same batches", "buffers": "different buffers",
    "hooks": "is not linear", "leaves": "belongs to no module", "untrained": "they do not train",
}  # fmt: skip


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, None


class Net(nn.Module):
    """Does what should be said, or nothing of it."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down, self.extra = (nn.Linear(4, 4) for _ in range(3))
        self.blocks = bmt.TransformerBlockList([bmt.Block(nn.Linear(4, 4))])  # else all of it draws its own
        self.register_buffer("center", torch.zeros(4))
        if kind == "hooks":
            self.down.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0].clamp(-0.1, 0.1),))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x).tanh()
        if self.kind == "draws":
            x = x + 0.1 * torch.randn_like(x)
        if self.kind == "hosts":
            x = x + __import__("random").random()
        if self.kind == "buffers":
            self.center += x.detach().mean(0)
        x = self.down(self.blocks(x))
        return x + _NoGradient.apply(x, self.extra.weight) if self.kind == "untrained" else x  # type: ignore[no-any-return, no-untyped-call]


def loss_of(kind: str, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if kind == "counts":
        return F.cross_entropy(out, y.masked_fill(y == 0, -100))
    if kind == "sum":
        return F.cross_entropy(out, y, reduction="sum")
    if kind == "across":
        rows = F.normalize(out, dim=1)
        return F.cross_entropy(rows @ rows.t(), torch.arange(len(rows), device=rows.device))
    return F.cross_entropy(out, y)


class Trained:
    """A model of ``kind`` with an optimizer of its own."""

    def __init__(self, kind: str = "", model: Any = None) -> None:
        self.kind, self.model = kind, bmt.BMTrainModelWrapper(Net(kind)) if model is None else model
        self.manager = bmt.optim.OptimManager()
        self.manager.add_optimizer(bmt.optim.AdamOptimizer(self.model.parameters(), lr=1e-2))
        self.leaf = torch.zeros(4, device=context().device.torch_device, requires_grad=True)

    def forward(self, step: int, others: float = 0.0) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(step)
        x, y = torch.randn(12, 4, generator=generator), torch.randint(4, (12,), generator=generator)
        if self.kind != "batches":
            x, y = bmt.shard_batch(x), bmt.shard_batch(y)
        x, y = bmt.to_device((x, y))
        out = self.model(x) + others
        return loss_of(self.kind, out + self.leaf if self.kind == "leaves" else out, y)

    def step(self, step: int) -> None:
        self.manager.zero_grad()
        self.manager.backward(self.forward(step))
        if self.leaf.grad is not None:
            with torch.no_grad():
                self.leaf -= self.leaf.grad
            self.leaf.grad = None
        self.manager.step()


def said_later(kind: str, when: str) -> list[list[str]]:
    """What is said of a model that trains after another one, and meanwhile of that."""
    first = Trained()
    second = Trained(kind) if when == "made before" else None
    with oracle.heard(WORDS[kind]) as before:
        for step in range(10):
            first.step(step)
    second = second or Trained(kind)
    with oracle.heard(WORDS[kind]) as later:
        for step in range(5):
            second.step(step)
            if when == "made beside":
                first.step(step)
    return [before, later]


@pytest.mark.parametrize("when", ["made before", "made later", "made beside"])
def test_a_second_model_is_looked_at_as_the_first(when: str) -> None:
    for kind in WORDS:
        if kind == "leaves" and when == "made beside":
            continue
        if kind == "draws" and os.environ.get("BMTRAIN_TEST_DEVICE") == "cuda":
            continue  # there a whole forward's draws are each rank's own
        (before, later), other = run_ranks(2, said_later, kind, when, fresh=kind == "counts")
        assert not before and len(later) == 1, (kind, before, later)
        assert other == [before, later if kind == "untrained" else []], kind


@pytest.mark.parametrize("when", ["made before", "made later", "made beside"])
def test_nothing_is_said_of_what_is_as_it_should_be(when: str) -> None:
    assert run_ranks(2, quiet, when) == [[], []]
    assert run_ranks(3, quiet, when) == [[], [], []]


def quiet(when: str) -> list[str]:
    with oracle.heard("") as found:
        said_later_of_nothing(when)
    return found


def said_later_of_nothing(when: str) -> None:
    first = Trained()
    second = Trained() if when == "made before" else None
    for step in range(6):
        first.step(step)
    second = second or Trained()
    for step in range(6):
        second.step(step)
        if when == "made beside":
            first.step(step)


def seldom(every: int) -> list[str]:
    """Of two models the second trains once in so many steps of the first, in all of which it runs."""
    critic, generator = Trained(), Trained("counts")
    with oracle.heard(WORDS["counts"]) as found:
        for step in range(4 * every):
            others = generator.forward(step)
            if step % every == every - 1:
                generator.step(step)
            critic.manager.zero_grad()
            critic.manager.backward(critic.forward(step, float(others.detach())))
            critic.manager.step()
    return found


def test_a_model_that_trains_once_in_five_steps() -> None:
    assert [len(words) for words in run_ranks(2, seldom, 5, fresh=True)] == [1, 0]


def headed() -> list[str]:
    """A model that was pretrained gets another head."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Net(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))  # type: ignore[no-any-return]

    trained = Trained("", bmt.BMTrainModelWrapper(Model()))
    for step in range(6):
        trained.step(step)
    trained.model.head = bmt.BMTrainModelWrapper(nn.Linear(4, 4))
    tuned = Trained("counts", trained.model)
    with oracle.heard(WORDS["counts"]) as found:
        for step in range(4):
            tuned.step(step)
    return found


def test_a_model_with_a_new_part_is_looked_at_again() -> None:
    assert [len(words) for words in run_ranks(2, headed, fresh=True)] == [1, 0]


def folds() -> list[str]:
    with oracle.heard(WORDS["counts"]) as found:
        for _ in range(4):
            fold = Trained("counts")
            for step in range(5):
                fold.step(step)
    return found


def test_what_is_said_of_one_fold_is_not_said_of_the_next() -> None:
    assert [len(words) for words in run_ranks(2, folds, fresh=True)] == [1, 0]


@on_ranks(2)
def test_after_the_first_steps_nothing_is_exchanged_for_them() -> None:
    models, control = [Trained() for _ in range(3)], context().control
    for trained in models:
        for step in range(10):
            trained.step(step)
    names, calls = ("all_reduce", "all_gather", "broadcast"), list[str]()
    for name in names:
        setattr(control, name, lambda *args, name=name: calls.append(name))
    try:
        for step in range(3):
            for trained in models:
                trained.step(step)
    finally:
        for name in names:
            delattr(control, name)
    assert not calls
