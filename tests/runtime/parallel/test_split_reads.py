"""What is read of slices of layers: norms and other numbers of all elements are the layers', as in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import oracle
import pytest
import test_plan
import torch
from ranks import on_ranks
from torch import nn
from trains_alike import batch

import bmtrain as bmt
from bmtrain.errors import UnsupportedError

NUMBERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "norm": lambda t: t.norm(),
    "absolute": lambda t: t.norm(1),
    "largest": lambda t: t.abs().max(),
    "least": lambda t: t.min(),
    "sum": lambda t: t.sum(),
    "mean": lambda t: t.double().mean(),
    "deviation": lambda t: t.std(),
    "positive": lambda t: (t > 0).sum(),
    "dot": lambda t: torch.dot(t.view(-1), t.view(-1)),
}


MOST, ORDERS = (5.0, 1.0, 0.5, 0.05), ((2.0, None), (1.0, None), (inf, None), (2.0, False))


def both() -> tuple[Any, Any]:
    torch.manual_seed(5)
    reference = test_plan.Model()
    torch.manual_seed(5)
    model = test_plan.Model()
    bmt.parallelize_module(model, test_plan.PLAN | {"head": "colwise_gather_output"})
    model.layers = bmt.TransformerBlockList([bmt.Block(layer) for layer in model.layers])
    return reference, bmt.BMTrainModelWrapper(model)


def backward(reference: Any, model: Any) -> None:
    reference(*batch(0)).backward()
    model(*(bmt.shard_batch(x) for x in batch(0))).backward()


@on_ranks(2, init={"tp_size": 2})
def test_a_norm_with_gradients_is_refused() -> None:
    _, model = both()
    weight = next(p for p in model.parameters() if p._tp_mode and p.dim() > 1)
    with pytest.raises(UnsupportedError, match="which gives the layer's"):
        weight.norm()
    assert weight.square().sum().requires_grad and model.norm.weight.norm().requires_grad


@on_ranks(2, 4, init={"tp_size": 2})
def test_numbers_of_all_elements_are_the_layers() -> None:
    reference, model = both()
    backward(reference, model)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        for kind, number in NUMBERS.items():
            oracle.assert_close(number(p.data).double(), number(q.data).double(), f"{kind} of {name}", 1e-4)
            if kind in ("norm", "largest", "dot"):
                oracle.assert_close(number(p.grad).double(), number(q.grad).double(), f"{kind} of {name}'s grad", 1e-3)
        with torch.no_grad():
            oracle.assert_close(p.norm(), q.norm(), f"norm of {name}")


@on_ranks(2, 4, init={"tp_size": 2})
def test_torch_clips_by_the_norm_of_the_whole_model() -> None:
    reference, model = both()
    backward(reference, model)
    clip = nn.utils.clip_grad_norm_
    for most, (order, foreach) in zip(MOST, ORDERS, strict=True):
        found = clip(model.parameters(), most, norm_type=order, foreach=foreach)
        oracle.assert_close(found, clip(reference.parameters(), most, norm_type=order), "the norm", 1e-4)
    for factor in (1, 2, 3):
        for kind in (model, reference):
            with torch.no_grad():
                for parameter in kind.parameters():
                    parameter.grad.mul_(factor)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            grad = bmt.gather_grad(p, join=True)
            assert grad is not None and q.grad is not None
            oracle.assert_close(grad, q.grad, f"the gradient of {name}", 1e-3)


@on_ranks(2, 4, init={"tp_size": 2})
def test_one_rank_may_look_whether_a_slice_has_a_gradient() -> None:
    reference, model = both()
    for rank in range(bmt.world_size()):
        if bmt.rank() == rank:
            assert all(p.grad is None for p in model.parameters())
    backward(reference, model)
    for rank in range(bmt.world_size()):
        if bmt.rank() == rank:
            assert [p.grad is None for p in model.parameters()] == [q.grad is None for q in reference.parameters()]
            assert all(p.grad.shape == p.shape for p in model.parameters())
    model.zero_grad()
    if bmt.rank() == 0:
        assert all(p.grad is None for p in model.parameters())
