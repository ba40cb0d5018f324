"""``torch.autograd.backward(loss)`` is the backward of a loss; with gradients it is part of one, and stays."""

from __future__ import annotations

import re

import pytest

from tests.runtime.ranks import run_ranks

from ...helpers import converted, weights_after

SCRIPT = """import torch
from torch import autograd
from torch.utils.data import DataLoader, TensorDataset


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x.detach())
        return layer(x.detach())

    @staticmethod
    def backward(ctx, dy):
        return back(ctx, dy), None


def back(ctx, dy):
    (x,) = ctx.saved_tensors
    with torch.enable_grad():
        x.requires_grad = True
        y = ctx.layer(x)
        {inner}
    return x.grad


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.b = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.b(Turned.apply(self.a(x), torch.nn.functional.relu))


torch.manual_seed(1)
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for (x,) in DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4):
    opt.zero_grad()
    loss = net(x).square().mean()
    {outer}
    opt.step()
"""
INNER = {
    "two": "torch.autograd.backward(y, dy)",
    "named": "torch.autograd.backward(y, grad_tensors=dy)",
    "lists": "autograd.backward([y], [dy], retain_graph=True)",
}
OUTER = {
    "a loss": "torch.autograd.backward(loss)",
    "by the module": "autograd.backward(loss)",
    "a list": "torch.autograd.backward([loss / 2, loss / 2])",
    "a tuple": "torch.autograd.backward((loss,))",
    "with a flag": "torch.autograd.backward(loss, retain_graph=True)",
}


@pytest.mark.parametrize("name", INNER)
def test_gradients_by_hand_stay(name: str) -> None:
    assert INNER[name] in converted(SCRIPT.format(inner=INNER[name], outer="loss.backward()"))


@pytest.mark.parametrize(
    ("inner", "outer"), [*((name, "a loss") for name in INNER), *(("two", name) for name in OUTER)]
)
def test_steps_are_those_of_one_process(inner: str, outer: str) -> None:
    text = SCRIPT.format(inner=INNER[inner], outer=OUTER[outer])
    wanted = weights_after(text)
    after = converted(text)
    assert OUTER[outer] not in after and "optim_manager." in after
    for found in run_ranks(2, weights_after, re.sub(r"bmt\.init_distributed\(.*\)", "torch.manual_seed(1)", after)):
        assert found == pytest.approx(wanted, abs=1e-5)
