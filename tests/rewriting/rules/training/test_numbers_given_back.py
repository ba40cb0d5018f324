"""Numbers that functions give back, or that stand in displays, become the batch's once; rates are nobody's share."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.rewriting.helpers import converted, printed
from tests.runtime.ranks import run_ranks

HEAD = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train_step(net, opt, x, y):
    out = net(x)
    loss = nn.functional.cross_entropy(out, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return {returned}


class Trainer:
    def __init__(self, net, loader):
        self.net, self.loader = net, loader
        self.opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(self, x, y):
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss.item(), len(x)

    def fit(self):
        for x, y in self.loader:
            value, n = self.step(x, y)
            print(f"{value:.4f} {n}")


torch.manual_seed(0)
data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
loader = DataLoader(data, batch_size=6)
val_loader = DataLoader(data, batch_size=4)
net = nn.Linear(4, 3)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
total = seen = 0
temp = torch.tensor(1.0)
"""
FUNCTION = HEAD + "for step, (x, y) in enumerate(loader):\n    {use}\n"
LOOP = HEAD.replace("{returned}", "loss") + (
    "for step, (x, y) in enumerate(loader):\n    out = net(x)\n    loss = nn.functional.cross_entropy(out, y)\n"
    "    optimizer.zero_grad()\n    loss.backward()\n    optimizer.step()\n    {use}\n"
)
STEP = "train_step(net, optimizer, x, y)"
HITS = "(out.argmax(1) == y).sum().item()"
GIVEN = {
    "hits and a size": (f"loss.item(), {HITS}, len(y)", f'a, h, n = {STEP}\n    print(f"{{a:.4f}} {{h}} {{n}}")'),
    "by place": ("loss.item(), len(x)", f'a = {STEP}\n    print(f"{{a[0]:.4f}} {{a[1]}}")'),
    "a dict": (
        f"{{'loss': loss.item(), 'hits': {HITS}, 'n': len(y)}}",
        f"m = {STEP}\n    print(f\"{{m['loss']:.4f}} {{m['hits']}} {{m['n']}}\")",
    ),
    "a mean": (
        "loss.item(), out.argmax(1).eq(y).float().mean().item()",
        f'a, b = {STEP}\n    print(f"{{a:.4f}} {{b:.4f}}")',
    ),
    "weighed": (
        "loss.item() * len(x), len(x)",
        f'a, n = {STEP}\n    total += a\n    seen += n\n    print(f"{{total / seen:.4f}} {{seen}}")',
    ),
    "a float": ("float(loss.detach())", f'a = {STEP}\n    print(f"{{min(a, 9.0):.4f}}")'),
    "outputs": (
        "loss.detach(), out.detach()",
        f'a, o = {STEP}\n    print(f"{{a:.4f}} {{(o.argmax(1) == y).float().mean():.4f}}")',
    ),
}  # fmt: skip
SHOWN = {
    "pairs": (
        'names, losses = ["a", "b"], [loss, out.abs().mean()]\n    for name, value in zip(names, losses):\n'
        '        print(name, f"{value.item():.4f}")'
    ),
    "rows": 'for name, value in (("a", loss), ("b", out.pow(2).mean())):\n        print(name, f"{value.item():.4f}")',
    "joined": 'print(" ".join(f"{v:.4f}" for v in (loss.item(), out.mean().item())))',
    "joined, of a name": (
        "held = [loss.item(), out.abs().mean().item()]\n"
        '    print(" ".join(f"{n} {v:.4f}" for n, v in zip("ab", held)))'
    ),
    "a temperature": 'temp = temp * 0.9\n    print(f"{temp.item():.4f}")',
    "a rate": 'rate = torch.sigmoid(torch.tensor(step / 10.0))\n    print(f"{rate.item():.4f}")',
    "a rate of lengths": (
        "part = step / min(len(loader), 9)\n    rate = 2 / (1 + torch.exp(torch.tensor(-part)).item())\n"
        '    print(f"{rate:.4f}")'
    ),
    "another loader's losses in a list": (
        "with torch.no_grad():\n"
        "        value = torch.stack([nn.functional.cross_entropy(net(a), b) for a, b in val_loader]).mean()\n"
        '    print(f"{value.item():.4f}")'
    ),
    "another loader's losses": (
        "values = torch.zeros(3)\n    for k, (a, b) in enumerate(val_loader):\n        with torch.no_grad():\n"
        '            values[k] = nn.functional.cross_entropy(net(a), b).item()\n'
        '    print(f"{values.mean().item():.4f}")'
    ),
}  # fmt: skip
CASES = {
    **{name: FUNCTION.replace("{returned}", given).replace("{use}", use) for name, (given, use) in GIVEN.items()},
    **{name: LOOP.replace("{use}", use) for name, use in SHOWN.items()},
    "a method": HEAD.replace("{returned}", "loss") + "Trainer(net, loader).fit()\n",
}


@pytest.mark.parametrize("returned", ["loss.item(), out.max().item()", "loss.item(), float(out.std())"])
def test_what_is_no_mean_is_said(returned: str) -> None:
    text = FUNCTION.replace("{returned}", returned).replace("{use}", f"a, b = {STEP}\n    print(a, b)")
    assert any("is of this rank's share of the batch" in finding.message for finding in convert_text(text).reported)


@pytest.mark.parametrize("text", CASES.values(), ids=CASES.keys())
def test_nothing_is_said_and_nothing_averaged_twice(text: str) -> None:
    assert not any("rank's share" in finding.message for finding in convert_text(text).reported)
    assert "bmt.sum_loss(value)" not in converted(text)


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name: str) -> None:
    wanted = printed(CASES[name])
    first, second = run_ranks(2, printed, converted(CASES[name]), initialize=False, fresh=True)
    assert first == wanted and not second
