"""Tensors of no module that are stepped on by hand: told of once, when ranks have come to hold others."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.autograd import running_backward
from bmtrain.context import context


def said(kind: str) -> list[str]:
    device = context().device.torch_device
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(nn.Linear(4, 4))
    leaf = torch.zeros((3, 4) if kind == "rows" else (4,), device=device, requires_grad=True)
    every = 2 if kind == "accumulated" else 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            x = bmt.shard_batch(torch.randn(3 * bmt.world_size(), 4))
            if kind == "optimizer" and not step:
                bmt.optim.OptimManager().add_optimizer(torch.optim.SGD([leaf], lr=0.0))
            (model(x) + leaf).tanh().square().mean().backward()
            if kind == "kept" or step % every or leaf.grad is None:
                continue
            gradient = leaf.grad if kind != "averaged" else bmt.distributed.all_reduce(leaf.grad, "avg")
            with torch.no_grad():
                leaf -= gradient
            leaf.grad = None
    return [str(w.message) for w in caught if "belongs to no module" in str(w.message)]


@pytest.mark.parametrize(
    ("kind", "times"),
    [("stepped", 1), ("accumulated", 1), ("averaged", 0), ("kept", 0), ("rows", 0), ("optimizer", 0)],
)
def test_leaves_that_come_to_differ_are_told_of_once(kind: str, times: int) -> None:
    first, other = run_ranks(2, said, kind)
    assert len(first) == times and not other
    if first:
        assert (
            "of shape (4,)" in first[0] and "test_first_leaves.py:" in first[0] and "all_reduce(tensor.grad" in first[0]
        )


def test_on_one_rank_nothing_is_said() -> None:
    assert run_ranks(1, said, "stepped") == [[]]


def test_a_backward_is_found_from_another_thread() -> None:
    """As on GPUs, where a thread of autograd's calls hooks."""
    weight, found = torch.ones(3, requires_grad=True), []
    loss = (2 * weight).sum()

    def look(_: torch.Tensor) -> None:
        thread = threading.Thread(target=lambda: found.append(running_backward()))
        thread.start()
        thread.join()

    weight.register_hook(look)
    loss.backward()
    (((root,), frame),) = found
    assert root is loss and frame is not None
    assert running_backward() == ((), None)
