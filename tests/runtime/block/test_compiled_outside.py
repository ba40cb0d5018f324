"""Compiled code that uses parameters outside of any forward: it does as it would uncompiled, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

WIDTH = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.block = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(torch.relu(self.enter(x)))  # type: ignore[no-any-return]


def penalty(net: Net) -> torch.Tensor:
    return sum((p.square().sum() for p in net.parameters()), torch.zeros((), device=net.enter.weight.device))


def loss_with_penalty(net: Net) -> torch.Tensor:
    x = torch.ones(4, WIDTH, device=net.enter.weight.device)
    return net(x).square().mean() + 0.01 * net.enter.weight.square().sum()


def borrowed(net: Net) -> torch.Tensor:
    return F.linear(torch.ones(2, WIDTH, device=net.enter.weight.device), net.block.weight).square().sum()


def joined(net: Net) -> torch.Tensor:
    return torch.cat([p.flatten() for p in net.parameters()]).square().mean()


def detached(net: Net) -> torch.Tensor:
    return net.enter.weight.detach().norm() * 2


def number(net: Net) -> float:
    return net.enter.weight.sum().item()


def of_gradients(net: Net) -> torch.Tensor:
    net(torch.ones(4, WIDTH, device=net.enter.weight.device)).square().mean().backward()
    return grad_norm(net)


@torch.compile(backend="aot_eager")
def grad_norm(net: Net) -> torch.Tensor:
    return torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()


@torch.no_grad()
def decayed(net: Net) -> torch.Tensor:
    for p in net.parameters():
        p.mul_(0.5)
    return net.enter.weight.norm()


def decayed_data(net: Net) -> torch.Tensor:
    for p in net.parameters():
        p.data.mul_(0.5)
    return net.enter.weight.detach().norm()


@torch.no_grad()
def averaged(net: Net) -> torch.Tensor:
    kept = [torch.zeros(p.shape, device=p.device) for p in net.parameters()]
    for average, p in zip(kept, net.parameters(), strict=True):
        average.mul_(0.9).add_(p.detach(), alpha=0.1)
    return torch.stack([average.norm() for average in kept])


def counted(net: Net) -> int:
    return sum(p.numel() for p in net.parameters() if p.dim() > 1)


CALLS = {
    call.__name__: call
    for call in (
        penalty, loss_with_penalty, borrowed, joined, detached, number, of_gradients, decayed, decayed_data, averaged,
        counted,
    )
}  # fmt: skip


def _compiled(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return call if call is of_gradients else torch.compile(call, backend="aot_eager")


@pytest.mark.parametrize("name", list(CALLS))
@on_ranks(1, 2)
def test_it_does_as_uncompiled(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, model = Net(), Net()
    model.load_state_dict(plain.state_dict())
    model.block = bmt.Block(model.block)
    model = bmt.BMTrainModelWrapper(model)
    plain.to(next(model.parameters()).device)
    call = _compiled(CALLS[name])
    for _ in range(2):
        expected, found = CALLS[name](plain), call(model)
        if not isinstance(expected, torch.Tensor):
            assert found == pytest.approx(expected)
            continue
        oracle.assert_close(torch.as_tensor(found).detach(), expected.detach(), name)
        if expected.requires_grad:
            expected.backward()
            found.backward()
            oracle.assert_same_grads(model, plain)
            plain.zero_grad()
            model.zero_grad()
    oracle.assert_same_weights(model, plain)


@on_ranks(2)
def test_what_must_be_one_graph_is_refused_by_torch() -> None:
    torch._dynamo.reset()
    model = bmt.BMTrainModelWrapper(Net())
    with pytest.raises(Exception, match=r"graph break|fullgraph|Unsupported|unsupported"):
        torch.compile(penalty, backend="aot_eager", fullgraph=True)(model)


@on_ranks(1, 2)
def test_a_model_in_one_graph_is_refused_with_what_to_do() -> None:
    torch._dynamo.reset()
    model = bmt.BMTrainModelWrapper(Net())
    run = torch.compile(lambda x: model(x).sum(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="Leave out fullgraph=True"):
        run(torch.ones(2, WIDTH, device=next(model.parameters()).device))
