"""Sums and means of a batch's first item are rank 0's own; of some items they are reported; of all they are totals."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.rewriting.helpers import converted, printed
from tests.runtime.ranks import run_ranks

SCRIPT = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return {returned}


torch.manual_seed(0)
data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
criterion = nn.CrossEntropyLoss()
total = 0.0
kept = []
for x, y in DataLoader(data, batch_size=6):
    x = x.to("cpu")
    {call}
    loss = criterion({logits}, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    {shown}
"""
ONE = ("self.b(h)", "out = net(x)", "out")
TUPLE = ("(self.b(h), h)", "out = net(x)", "out[0]")
SAID = "of this rank's share"
RIGHT = {
    "a sum of the first": (ONE, 'print(f"{out[0].sum().item():.4f}")'),
    "a mean of the first": (ONE, 'print(f"{out[0].mean().item():.4f}")'),
    "of the input": (ONE, 'print(f"{x[0].sum().item():.4f}")'),
    "one value": (ONE, 'print(f"{out[0, 1].item():.4f}")'),
    "by a name": (ONE, 'first = out[0]\n    print(f"{first.sum().item():.4f}")'),
    "by a number's name": (ONE, 'at = 0\n    print(f"{out[at].sum().item():.4f}")'),
    "of probabilities": (ONE, 'print(f"{out.softmax(1)[0].sum().item():.4f} {out.softmax(1)[0].max().item():.4f}")'),
    "a norm": (ONE, 'print(f"{out[0].norm().item():.4f}")'),
    "two of them compared": (ONE, 'print(f"{(out[0] - out[1]).abs().sum().item():.4f}")'),
    "a prediction": (ONE, "print(out[0].argmax().item(), y.cpu()[0].item())"),
    "added up": (ONE, 'total += out[0].sum().item()\n    print(f"{total:.4f}")'),
    "kept": (ONE, "kept.append(out[0].sum().item())\n    print([round(item, 4) for item in kept])"),
    "its size": (ONE, "print(len(out[0]), out[0].numel(), out[0].shape[0])"),
    "all": (ONE, 'print(f"{out.sum().item():.4f} {out[:, 0].sum().item():.4f} {out[:, 1].mean().item():.4f}")'),
    "members of a tuple": (TUPLE, 'print(f"{out[0].sum().item():.4f} {out[1].mean().item():.4f}")'),
    "by a mask": (ONE, 'print(f"{out[y == 0].sum().item():.4f}")'),
    "by a place of each": (ONE, 'print(f"{out[range(len(y)), y].mean().item():.4f}")'),
    "the largest of each": (ONE, 'print(f"{out.max(1)[0].mean():.4f} {out.topk(2, dim=1)[0].sum().item():.4f}")'),
    "sums of sums": (ONE, 't = x.sum(0)\n    print(f"{t.mean().item():.4f} {t.sum().item():.4f} {t[0].item():.4f}")'),
    "sums of means": (ONE, 'm = x.mean(0)\n    print(f"{m.sum().item():.4f} {m.mean().item():.4f}")'),
    "several dimensions": (ONE, 'print(f"{out.mean((0, 1)).item():.4f} {out.sum(dim=(0, 1)).item():.4f}")'),
    "sums over what a mask leaves": (ONE, 'k = y > 0\n    print(f"{(out[:, 0] * k).sum().item() / k.sum():.4f}")'),
    "counts by class": (ONE, "c = y.bincount(minlength=3)\n    print(c[0].item(), c.sum().item())"),
    "a precision": (ONE, 'print(f"{((out.argmax(1) == 1) & (y == 1)).sum() / (y == 1).sum():.4f}")'),
}  # fmt: skip
SOME = {
    "the first ones": (ONE, 'print(f"{out[:2].sum().item():.4f}")'),
    "but the first": (ONE, 'print(f"{out[1:].sum().item():.4f}")'),
    "the last": (ONE, 'print(f"{out[-1].sum().item():.4f}")'),
    "not read as a number": (ONE, "print(out[:2].sum())"),
    "how many": (ONE, "print(len(out[:2]))"),
    "some hits": (ONE, "print((out[:2].argmax(1) == y[:2]).float().mean().item())"),
    "perhaps a list": (("{'a': self.b(h)}", "out = net(x)", "out['a']"), "print(out['b'][0].sum().item())"),
    "by select": (ONE, "print(out.select(0, 0).sum().item())"),
    "a spread": (ONE, "s = x.std(0)\n    print(s.sum().item())"),
    "a sum of the largest": (ONE, "print(x.max().sum().item())"),
    "the largest, as it is": (ONE, "print(out.max())"),
    "a mean by a mask": (ONE, "print(out[y == 1].mean().item())"),
    "an accuracy by a mask": (ONE, "acc = (out.argmax(1) == y)[y > 0].float().mean()\n    print(acc.item())"),
    "an entry of counts": (ONE, "counts = y.bincount()\n    print(counts[0].item(), counts.sum())"),
}


def script(made: tuple[str, str, str], shown: str) -> str:
    text = SCRIPT.replace("{returned}", made[0]).replace("{call}", made[1]).replace("{logits}", made[2])
    return text.replace("{shown}", shown)


@pytest.mark.parametrize(("made", "shown"), SOME.values(), ids=SOME.keys())
def test_what_is_another_on_another_rank_is_said(made: tuple[str, str, str], shown: str) -> None:
    assert any(SAID in finding.message for finding in convert_text(script(made, shown)).reported)


@pytest.mark.parametrize(("made", "shown"), RIGHT.values(), ids=RIGHT.keys())
def test_what_is_that_of_one_process_is_not_said(made: tuple[str, str, str], shown: str) -> None:
    assert not any(SAID in finding.message for finding in convert_text(script(made, shown)).reported)


@pytest.mark.parametrize("made", [ONE, TUPLE], ids=["a tensor", "a tuple"])
def test_on_two_ranks(made: tuple[str, str, str]) -> None:
    text = script(made, "\n    ".join(shown for kind, shown in RIGHT.values() if kind is made))
    wanted = printed(text)
    first, second = run_ranks(2, printed, converted(text), initialize=False, fresh=True)
    assert first == wanted and not second
