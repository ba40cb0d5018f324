"""Buffers that forwards move otherwise on some ranks are told of, once."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt


class Head(nn.Module):
    """Takes off the mean of its inputs so far, as DINO does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind
        self.norm: Any = nn.InstanceNorm1d(1, track_running_stats=True) if kind == "norms" else nn.Identity()
        self.register_buffer("center", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2, 4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.linear(x)[:, None])[:, 0]
        self.steps += 1
        with torch.no_grad():
            mean = x.mean(0)
            if self.kind == "reduced":
                mean = bmt.distributed.all_reduce(mean, "avg")
            if self.kind in ("center", "reduced", "evaluated"):
                self.center.mul_(0.9).add_(mean, alpha=0.1)
            if self.kind == "seen":
                self.seen = x[:2].clone()
        return x - self.center


def said(kind: str, blocks: bool) -> list[str]:
    torch.manual_seed(0)
    heads: list[nn.Module] = [Head(kind), Head(kind)]
    net = nn.Sequential(*(bmt.Block(head, use_checkpoint=True) if blocks else head for head in heads))
    model = bmt.BMTrainModelWrapper(net)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with oracle.heard("different buffers") as found:
        for step in range(5):
            x = bmt.shard_batch(torch.randn(12, 4, generator=torch.Generator("cpu").manual_seed(step)))
            manager.zero_grad()
            manager.backward(model.train(kind != "evaluated")(x).square().mean())
            manager.step()
    return found


@pytest.mark.parametrize("kind", ["counted", "norms", "reduced"])
def test_nothing_is_said_of_buffers_that_are_the_same_or_become_means(kind: str) -> None:
    for blocks in (False, True):
        assert run_ranks(2, said, kind, blocks) == [[], []]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("center", "Sequential.0.center"), ("evaluated", "Sequential.0.center"), ("seen", "Sequential.1.seen")],
)
def test_buffers_that_differ_are_said_once_and_where(kind: str, name: str) -> None:
    for blocks in (False, True):
        found = run_ranks(2, said, kind, blocks)
        assert len(found[0]) == 1 and not found[1]
        assert name in found[0][0] and "test_first_buffers.py:" in found[0][0] and "all_reduce" in found[0][0]
    assert run_ranks(1, said, kind, False) == [[]]
