"""Functions that a training loop hands outputs and targets, and that show a number of them: they are told."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

writer = SummaryWriter("logs")
model = nn.Linear(4, 3)
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
loader, others = DataLoader(data, batch_size=12, shuffle=True), DataLoader(data, batch_size=12)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
texts = {{}}


{define}


for i, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    out = model(x)
    loss = nn.functional.cross_entropy(out, y)
    loss.backward()
    optimizer.step()
    {call}
"""
QUIET = {
    "another number": ("def show(i):\n    print(f'{i:.3f}')", "show(i)"),
    "a shape": ("def show(o):\n    print(o.dtype, o.shape[1])", "show(out)"),
    "gives it back": ("def accuracy(o, y):\n    return (o.argmax(1) == y).float().mean()", "print(accuracy(out, y))"),
    "makes it whole": (
        "import bmtrain as bmt\n\n\ndef show(o, y):\n    print(bmt.sum_loss((o.argmax(1) == y).float().mean()))",
        "show(out, y)",
    ),
    "not called": ("def show(o, y):\n    print((o.argmax(1) == y).float().mean().item())", "pass"),
    "of whole data": (
        "def show(o, y):\n    print((o.argmax(1) == y).float().mean().item())",
        "if i == 0:\n        with torch.no_grad():\n            show(model(data.tensors[0]), data.tensors[1])",
    ),
    "the loss": ("def show(v):\n    print(f'{v:.3f}')", "show(loss)"),
}
TOLD = {
    "printed": ("def show(o, y):\n    print((o.argmax(1) == y).float().mean().item())", "show(out, y)"),
    "by a name": (
        "def show(o, y):\n    hits = (o.argmax(1) == y).float().mean()\n    print(f'{hits:.3f}')",
        "show(out, y)",
    ),
    "counted": ("def show(o, y):\n    print('hits', (o.argmax(1) == y).sum().item())", "show(out, y)"),
    "to a writer": (
        "def show(o, y, i):\n    writer.add_scalar('hits', (o.argmax(1) == y).float().mean(), i)",
        "show(out, y, i)",
    ),
    "in text": ("def text(o, y):\n    return f'{(o.argmax(1) == y).float().mean():.3f}'", "print(text(out, y))"),
    "in text that is kept": (
        "def text(o, y):\n    s = 'hits '\n    s += f'{(o.argmax(1) == y).float().mean():.3f}'\n    return s",
        "texts[i] = text(out, y)",
    ),
    "by another": (
        "def accuracy(o, y):\n    return (o.argmax(1) == y).float().mean()\n\n\n"
        "def show(o, y):\n    hits = accuracy(o, y)\n    print(f'{hits:.3f}')",
        "show(out, y)",
    ),
    "by an object": (
        "class Shows:\n    def show(self, o, y):\n        print((o.argmax(1) == y).float().mean().item())\n\n\n"
        "shower = Shows()",
        "shower.show(out, y)",
    ),
    "by name": ("def show(o, y=None):\n    print((o.argmax(1) == y).float().mean().item())", "show(out, y=y)"),
    "the size": ("def show(y):\n    print('of', len(y))", "show(y)"),
}


def told(define: str, call: str) -> list[str]:
    result = convert_text(SCRIPT.format(define=define, call=call))
    assert not result.error and b"OptimManager" in result.after
    return [said.message for said in result.reported if "of this rank's share of the batch" in said.message]


@pytest.mark.parametrize(("define", "call"), QUIET.values(), ids=QUIET.keys())
def test_nothing_is_told(define: str, call: str) -> None:
    assert told(define, call) == []


@pytest.mark.parametrize(("define", "call"), TOLD.values(), ids=TOLD.keys())
def test_a_function_that_shows_a_number_of_a_share_is_told(define: str, call: str) -> None:
    assert len(told(define, call)) == 1


BESIDE = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        out = self.inner(x)
        return out, out.softmax(1).mean(0).max()


model, kept = Model(), []
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for (x,) in DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=12):
    optimizer.zero_grad()
    out, used = model(x)
    loss = (out - x).square().mean()
    loss.backward()
    optimizer.step()
    kept.append({kept})
"""


@pytest.mark.parametrize("kept", ["used.item()", "float(used)", "100 * used.item()"])
def test_a_number_that_a_model_gives_is_no_sample(kept: str) -> None:
    result = convert_text(BESIDE.format(kept=kept))
    assert b"gather_samples" not in result.after
    assert any("may be of this rank's share" in said.message for said in result.reported)


def test_what_a_model_gives_for_each_item_is_collected() -> None:
    assert b"bmt.gather_samples(" in convert_text(BESIDE.format(kept="out.detach().numpy()")).after
