"""Code that is to be compiled as one graph and calls the model, or counts on all ranks, is compiled in pieces."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.rewriting.helpers import converted, printed
from tests.runtime.ranks import run_ranks

SCRIPT = """import functools
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.a(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


torch.manual_seed(0)
data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion = nn.CrossEntropyLoss(ignore_index=0)
{setup}
for x, y in DataLoader(data, batch_size=6):
    loss = {loss}
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.4f}")
"""
ONE = 'backend="eager", fullgraph=True'
STEP = "def step(x, y):\n    return F.cross_entropy(model(x), y)\n"
STAYS = {
    "functions of torch": (
        f"@torch.compile({ONE})\ndef of(out, y):\n    return F.cross_entropy(out, y)\n",
        "of(model(x), y)",
    ),
    "the model": (f"model = torch.compile(model, {ONE})", "F.cross_entropy(model(x), y)"),
    "the model, in place": (f"model.compile({ONE})", "F.cross_entropy(model(x), y)"),
    "pieces": ('criterion = torch.compile(criterion, backend="eager")', "criterion(model(x), y)"),
}  # fmt: skip
IN_PIECES = {
    "a loss that counts": (f"criterion = torch.compile(criterion, {ONE})", "criterion(model(x), y)"),
    "a function that counts": (
        f"@torch.compile({ONE})\ndef of(out, y):\n    return F.cross_entropy(out, y, ignore_index=0)\n",
        "of(model(x), y)",
    ),
    "a function that calls the model": (f"{STEP}\n\nstep = torch.compile(step, {ONE})", "step(x, y)"),
    "a decorated one": (f"@torch.compile({ONE})\n{STEP}", "step(x, y)"),
    "by partial": (f"@functools.partial(torch.compile, {ONE})\n{STEP}", "step(x, y)"),
    "a lambda": (f"run = torch.compile(lambda x: model(x), {ONE})", "F.cross_entropy(run(x), y)"),
    "a forward": (f"run = torch.compile(model.forward, {ONE})", "F.cross_entropy(run(x), y)"),
    "parameters": (
        f"@torch.compile({ONE})\ndef reg():\n    return sum(p.pow(2).sum() for p in model.parameters())\n",
        "F.cross_entropy(model(x), y) + 0.01 * reg()",
    ),
}
OPTIONS = 'options = dict(backend="eager", fullgraph=True)\ncriterion = torch.compile(criterion, **options)'


def script(setup: str, loss: str) -> str:
    return SCRIPT.replace("{setup}", setup).replace("{loss}", loss)


@pytest.mark.parametrize(("setup", "loss"), STAYS.values(), ids=STAYS.keys())
def test_what_may_be_one_graph_stays(setup: str, loss: str) -> None:
    text = script(setup, loss)
    assert converted(text).count("fullgraph=True") == text.count("fullgraph=True")


@pytest.mark.parametrize(("setup", "loss"), IN_PIECES.values(), ids=IN_PIECES.keys())
def test_what_bmtrain_works_in_is_compiled_in_pieces(setup: str, loss: str) -> None:
    after = converted(script(setup, loss))
    assert "fullgraph" not in after and 'backend="eager")' in after


def test_options_that_are_not_written_out_are_told() -> None:
    result = convert_text(script(OPTIONS, "criterion(model(x), y)"))
    assert any("fullgraph=True" in finding.message for finding in result.reported)


def test_a_model_that_compiles_itself_is_compiled_by_blocks() -> None:
    assert 'bmt.compile(model, backend="eager", fullgraph=True)' in converted(script(*STAYS["the model, in place"]))


@pytest.mark.parametrize("name", IN_PIECES)
def test_on_two_ranks(name: str) -> None:
    text = script(*IN_PIECES[name])
    wanted = printed(text)
    first, second = run_ranks(2, printed, converted(text), initialize=False, fresh=True)
    assert first == wanted and not second
