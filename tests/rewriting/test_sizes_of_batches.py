"""Tensors of the loader's batch size that are made in front of the loop: a rank's share of a batch is smaller."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch.utils.data import DataLoader

Tensor = torch.cuda.FloatTensor if args.cuda else torch.Tensor
net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
{before}
for x, y in DataLoader(data, batch_size=args.batch_size):
    {inside}
    loss.backward()
    opt.step()
    opt.zero_grad()
{behind}
"""
LOSS = "loss = torch.nn.functional.mse_loss(net(x), y)"
SMALLER = {
    "a buffer": ("held = Tensor(args.batch_size, 4)", "x = held.copy_(x)\n    " + LOSS),
    "labels": ("real = Tensor(args.batch_size, 1).fill_(1.0)", "loss = torch.nn.functional.mse_loss(net(x), real)"),
    "ones": ("real = torch.ones((args.batch_size, 1)).cuda()", "loss = torch.nn.functional.mse_loss(net(x), real)"),
    "a state": ("state = net.init_hidden(args.batch_size)", "loss = net(x, state).mean()"),
    "typed": ("real = torch.FloatTensor(args.batch_size)", "loss = (net(x)[:, 0] - real).mean()"),
}
AS_LARGE = {
    "another size": ("held = Tensor(args.width, 4)", "x = x @ held\n    " + LOSS, ""),
    "a number": ("steps = len(data) // args.batch_size", "loss = net(x).mean() / steps", ""),
    "behind the loop": ("held = Tensor(args.batch_size, 4)", LOSS, "print(net(held))"),
    "never read": ("held = Tensor(args.batch_size, 4)", LOSS, ""),
}


def told(before: str, inside: str, behind: str) -> bool:
    found = convert_text(SCRIPT.format(before=before, inside=inside, behind=behind)).reported
    return any("a rank's share of a batch has fewer" in said.message for said in found)


@pytest.mark.parametrize(("before", "inside"), SMALLER.values(), ids=SMALLER.keys())
def test_a_share_is_smaller(before: str, inside: str) -> None:
    assert told(before, inside, "")


@pytest.mark.parametrize(("before", "inside", "behind"), AS_LARGE.values(), ids=AS_LARGE.keys())
def test_no_share_meets_it(before: str, inside: str, behind: str) -> None:
    assert not told(before, inside, behind)
