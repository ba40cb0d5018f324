"""Buffers of recomputed blocks change once a step, as without recomputation."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt


class Layer(nn.Module):
    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.last + x.detach().mean(0)
        return x + torch.tanh(self.norm(self.inner(x)))


@pytest.mark.parametrize("recompute", [True, False])
@on_ranks(1, 2)
def test_buffers_change_once(recompute: bool) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(Layer(), Layer())
    model = bmt.BMTrainModelWrapper(
        nn.Sequential(*(bmt.Block(copy.deepcopy(m), use_checkpoint=recompute) for m in plain))
    )
    x = torch.randn(6, 4)
    manager = bmt.optim.OptimManager()
    for _ in range(2):
        plain(x).square().mean().backward()
        manager.backward(model(x).square().mean())
    for (name, expected), (_, found) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(expected, found), name
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        gradient = bmt.gather_grad(q)
        assert p.grad is not None and gradient is not None
        assert torch.allclose(p.grad, gradient, atol=1e-7), name


@on_ranks(2)
def test_batch_norms_are_levelled_before_evaluation() -> None:
    torch.manual_seed(1)
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()))
    rank = bmt.rank()
    # Each rank trains on data of its own; what it would have alone is computed beside it.
    alone = nn.BatchNorm1d(6)
    for step in range(2):
        x = torch.full((3, 4), float(rank + step)) + torch.arange(3.0)[:, None] * (rank + 1)
        model(x)
        with bmt.gathered(model):
            alone(nn.functional.linear(x, *model[0].parameters()))
    norm = model[1]
    assert torch.equal(norm.running_mean, alone.running_mean), "training runs are not levelled"
    model.eval()
    evaluated = model(torch.ones(3, 4))
    for name in ("running_mean", "running_var"):
        mean = bmt.distributed.all_reduce(getattr(alone, name), "avg")
        assert torch.allclose(getattr(norm, name), mean), name
        assert not torch.allclose(mean, getattr(alone, name)), name
    assert torch.equal(bmt.distributed.broadcast(evaluated, 0), evaluated), "every rank evaluates the same model"
    model.train()
    model(torch.full((3, 4), float(rank)) + torch.arange(3.0)[:, None])
    state = model.state_dict()["1.running_mean"]
    assert torch.equal(bmt.distributed.broadcast(state, 0), state), "every rank saves the same model"


@on_ranks(2)
def test_a_synced_batch_norm_without_a_process_group_is_said() -> None:
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with contextlib.suppress(ValueError, RuntimeError):  # torch's layer is for GPUs
                model(torch.ones(4, 3))
    said = [w for w in caught if "SyncBatchNorm" in str(w.message)]
    assert len(said) == (1 if bmt.rank() == 0 else 0)
