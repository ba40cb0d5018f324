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


MADE = """import torch
from torch import nn
from torch.utils.data import DataLoader


class Rays({base}):
    def __init__(self, size, width=4):
        {super}
        {made}

    def forward(self, x):
        return x + self.held


class Trainer:
    def __init__(self, args):
        self.args = args
        self.net = nn.Linear(4, 1)
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.loader = {loader}
        self.rays = {call}

    def fit(self):
        for x, y in self.loader:
            self.opt.zero_grad()
            loss = nn.functional.mse_loss(self.net(self.rays.forward(x)), y)
            loss.backward()
            self.opt.step()


if __name__ == "__main__":
    Trainer(args).fit()
"""
MODULE, PLAIN = ("nn.Module", "super().__init__()"), ("object", "pass")
BY_NAME, BY_PLACE = "DataLoader(data, batch_size=self.args.size)", "DataLoader(data, self.args.size, True)"
BUFFER = 'self.register_buffer("held", torch.zeros(size, width))'
KEPT = "self.size = size\n        self.held = nn.Parameter(torch.ones(self.size, width), requires_grad=False)"
FORWARD = "\n\n    def turned(self, x):\n        return x.view(self.size, 4)"
REPEATED = "self.held = torch.arange(width).unsqueeze(0).repeat(size, 1)"
CLASSES = {
    "a buffer": (*MODULE, BUFFER, BY_NAME, "Rays(self.args.size)"),
    "a loader by place": (*MODULE, BUFFER, BY_PLACE, "Rays(self.args.size, 4)"),
    "by its name": (*MODULE, BUFFER, BY_NAME, "Rays(width=4, size=self.args.size)"),
    "a parameter of what is kept": (*MODULE, KEPT, BY_PLACE, "Rays(self.args.size)"),
    "repeated": (*MODULE, REPEATED, BY_NAME, "Rays(self.args.size)"),
    "in its forward": (*MODULE, KEPT.replace("ones(self.size", "ones(1") + FORWARD, BY_NAME, "Rays(self.args.size)"),
    "no module": (*PLAIN, "self.held = torch.zeros((size, width))", BY_NAME, "Rays(self.args.size)"),
}
OTHERS = {
    "another size": (*MODULE, BUFFER, BY_NAME, "Rays(1)"),
    "another argument": (*MODULE, BUFFER.replace("size, width", "1, width"), BY_NAME, "Rays(self.args.size)"),
    "kept alone": (*PLAIN, "self.size, self.held = size, 0", BY_NAME, "Rays(self.args.size)"),
}


def told_of(base: str, super_: str, made: str, loader: str, call: str) -> bool:
    text = MADE.replace("{super}", super_)
    for name, code in {"base": base, "made": made, "loader": loader, "call": call}.items():
        text = text.replace(f"{{{name}}}", code)
    return any("makes tensors of self.args.size items" in said.message for said in convert_text(text).reported)


@pytest.mark.parametrize("parts", CLASSES.values(), ids=CLASSES.keys())
def test_an_object_that_is_made_for_whole_batches_is_reported(parts: tuple[str, str, str, str, str]) -> None:
    assert told_of(*parts)


@pytest.mark.parametrize("parts", OTHERS.values(), ids=OTHERS.keys())
def test_an_object_of_another_size_is_not(parts: tuple[str, str, str, str, str]) -> None:
    assert not told_of(*parts)


HANDED = {
    "by name": "loss = net(x, net.init_hidden(size=args.batch_size)).mean()",
    "to a manager of the model": f"with net.memories(batch_size=args.batch_size) as held:\n        {LOSS}",
    "to a method of the model": "loss = net(x, net.start(args.batch_size)).mean()",
    "to a function": "loss = net(x, memories(batch_size=args.batch_size)).mean()",
}
NOT_HANDED = {
    "another number": "loss = net(x, net.start(args.width)).mean()",
    "the batch's": "loss = net(x, net.start(batch_size=x.size(0))).mean()",
    "for a log": f"note(size=args.batch_size)\n    {LOSS}",
}
TAKEN = """import torch
from torch.utils.data import DataLoader


def cycle(loader):
    while True:
        for item in loader:
            yield item


net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = cycle(DataLoader(data, batch_size=args.batch_size))
for _ in range(4):
    x, y = next(loader)
    {inside}
    loss.backward()
    opt.step()
    opt.zero_grad()
"""


def handed(text: str, inside: str) -> bool:
    found = convert_text(text.format(before="", inside=inside, behind="")).reported
    return any("has fewer than args.batch_size items" in said.message for said in found)


@pytest.mark.parametrize("text", [SCRIPT, TAKEN], ids=["a loop", "next"])
@pytest.mark.parametrize("name", NOT_HANDED)
def test_other_numbers_in_the_loop_are_not_reported(name: str, text: str) -> None:
    assert not handed(text, NOT_HANDED[name])


@pytest.mark.parametrize("text", [SCRIPT, TAKEN], ids=["a loop", "next"])
@pytest.mark.parametrize("name", HANDED)
def test_the_size_of_whole_batches_that_is_handed_on_is_reported(name: str, text: str) -> None:
    assert handed(text, HANDED[name])
