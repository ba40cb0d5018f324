"""Losses that a loop hands to a function, or a method, which shows them: what it gets is that of all ranks."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.rewriting.helpers import printed
from tests.runtime.ranks import run_ranks

SCRIPT = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

writer = SummaryWriter("logs")
model = nn.Linear(4, 1)
loader = DataLoader(TensorDataset(torch.randn(24, 4), torch.randn(24, 1)), batch_size=12)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
kept = []


{define}


def run():
    total = 0
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        out = model(x)
        loss = nn.functional.mse_loss(out, y)
        total += loss
        {call}
        loss.backward()
        optimizer.step()
        total = 0


run()
"""
LEFT = {  # function, call: it does more with the loss than to show it, or shows something else
    "gives it back": ("def tap(v):\n    print(v.item())\n    return v", "loss = tap(loss)"),
    "goes back": ("def step(v):\n    print(v.item())\n    v.backward(retain_graph=True)", "step(loss)"),
    "keeps it": ("def keep(v):\n    print(v.item())\n    kept.append(v)", "keep(loss)"),
    "hands it on": ("def hand(v, model):\n    print(v.item())\n    model.last(v)", "hand(loss, model)"),
    "in an attribute": ("def keep(v):\n    print(v.item())\n    writer.last = v", "keep(loss)"),
    "shows nothing": ("def nothing(v):\n    pass", "nothing(loss)"),
    "a number": ("def show(v):\n    print(v)", "show(i)"),
}
SHOWN = {
    "formatted": ("def show(i, v):\n    print(f'{i} {v:.4f}')", "show(i, loss)", "show(i, bmt.sum_loss(loss))"),
    "read": ("def show(v):\n    print('loss', v.item())", "show(loss)", "show(bmt.sum_loss(loss))"),
    "by name": ("def show(i, v=0):\n    print(i, float(v))", "show(i, v=loss)", "show(i, v=bmt.sum_loss(loss))"),
    "added up": ("def show(v):\n    print(f'{v / 2:.4f}')", "show(total)", "show(bmt.sum_loss(total))"),
    "divided": ("def show(v):\n    print('%.4f' % v)", "show(total / 2)", "show(bmt.sum_loss(total) / 2)"),
    "named": (
        "def show(i, v):\n    mean = v / 2\n    writer.add_scalar('loss', mean, i)",
        "show(i, loss)",
        "show(i, bmt.sum_loss(loss))",
    ),
    "as text": ("def text(v):\n    return 'loss {:.4f}'.format(v)", "print(text(loss))", "text(bmt.sum_loss(loss))"),
    "text in parts": (
        "def text(i, v):\n    s = f'step {i}'\n    s += f' loss {v:.4f}'\n    return s",
        "print(text(i, loss))",
        "text(i, bmt.sum_loss(loss))",
    ),
    "as a number": (
        "def half(v):\n    return v.item() / 2",
        "print(half(loss))",
        "print_rank(bmt.sum_loss(half(loss)))",
    ),
    "by another": (
        "def text(v):\n    return f'{v:.4f}'\n\n\ndef show(v):\n    print(text(v))",
        "show(loss)",
        "show(bmt.sum_loss(loss))",
    ),
    "by an object": (
        "class Shows:\n    def show(self, v):\n        print(v.item())\n\n\nshower = Shows()",
        "shower.show(loss)",
        "shower.show(bmt.sum_loss(loss))",
    ),
    "where it is tested": (
        "def check(v):\n    if v.item() > 9:\n        raise ValueError(f'{v:.2f}')",
        "check(loss)",
        "check(bmt.sum_loss(loss))",
    ),
}


SAVED = {
    "there": 'torch.save({"at": i, "loss": loss}, "c.pt")',
    "by its name": 'state = {"at": i, "loss": loss}\n        torch.save(state, "c.pt")',
    "detached": 'torch.save({"at": i, "loss": loss.detach()}, "c.pt")',
    "a number": 'torch.save({"at": i, "loss": loss.item()}, "c.pt")',
    "added up": 'torch.save({"at": i, "loss": total / 2}, "c.pt")',
}


@pytest.mark.parametrize("call", SAVED.values(), ids=SAVED.keys())
def test_a_checkpoint_has_that_of_all_ranks(call: str) -> None:
    text = after("pass", call)
    assert text.count('"loss": bmt.sum_loss(') == 1
    assert convert_text(text).after.decode() == text


def test_a_dict_that_is_not_written_has_the_loss_itself() -> None:
    assert "sum_loss" not in after("pass", 'parts = {"loss": loss}')


def after(define: str, call: str) -> str:
    result = convert_text(SCRIPT.format(define=define, call=call))
    assert not result.error and b"OptimManager" in result.after
    return result.after.decode()


@pytest.mark.parametrize(("define", "call"), LEFT.values(), ids=LEFT.keys())
def test_what_does_more_gets_the_loss_itself(define: str, call: str) -> None:
    assert call in after(define, call)


@pytest.mark.parametrize(("define", "call", "expected"), SHOWN.values(), ids=SHOWN.keys())
def test_what_shows_it_gets_that_of_all_ranks(define: str, call: str, expected: str) -> None:
    text = after(define, call)
    assert expected in text
    again = convert_text(text)
    assert again.after.decode() == text


def test_on_two_ranks() -> None:
    (define, call), (other, text) = (SHOWN[name][:2] for name in ("added up", "text in parts"))
    script = SCRIPT.format(define=f"{define}\n\n\n{other}", call=f"{call}\n        {text}")
    script = script.replace('writer = SummaryWriter("logs")', "torch.manual_seed(0)")
    script = script.replace("from torch.utils.tensorboard import SummaryWriter\n", "")
    (wanted,) = run_ranks(1, printed, script, initialize=False, fresh=True)
    first, second = run_ranks(2, printed, convert_text(script).after.decode(), initialize=False, fresh=True)
    assert first == wanted and len(wanted) == 4 and second == []


TEXTS = {
    "returned": (
        "def accuracy(o, y):\n    a = (o - y).abs().mean()\n    return f'error {a}'",
        "print(accuracy(out, y))",
    ),
    "added": (
        "def accuracy(o, y):\n    return 'error ' + str((o - y).abs().mean())",
        "s = 'step '\n        s += accuracy(out, y)\n        print(s)",
    ),
    "made in parts": (
        "def accuracy(o, y):\n    s = 'error '\n    s += str((o - y).abs().mean())\n    return s",
        "print(accuracy(out, y))",
    ),
}


@pytest.mark.parametrize(("define", "call"), TEXTS.values(), ids=TEXTS.keys())
def test_text_is_no_mean_whatever_gives_it_is_called(define: str, call: str) -> None:
    assert "bmt.sum_loss(accuracy" not in (text := after(define, call)) and "bmt.sum_loss(s)" not in text


HOLDER = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Holder:
    def __init__(self, parameters):
        self.inner = torch.optim.SGD(parameters, lr=0.1)

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self):
        self.inner.step()

    def state_dict(self):
        return self.inner.state_dict()


model = nn.Linear(4, 1)
optimizer = Holder(model.parameters())
for x, y in DataLoader(TensorDataset(torch.randn(24, 4), torch.randn(24, 1)), batch_size=12):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
state = {what}
torch.save({saved}, "all.pt")
"""
HELD = {
    "in a dict": ('{"model": model, "optimizer": optimizer}', "state"),
    "there": ("None", '{"optimizer": optimizer}'),
    "alone": ("None", "optimizer"),
    "in a tuple": ("None", "(1, optimizer)"),
    "by dict": ("dict(optimizer=optimizer)", "state"),
}
STATES = {
    "a state": ('{"optimizer": optimizer.state_dict()}', "state"),
    "that of the inner one": ('{"optimizer": optimizer.inner.state_dict()}', "state"),
    "a model": ('{"model": model}', "state"),
}


def told(what: str, saved: str) -> list[str]:
    result = convert_text(HOLDER.replace("{what}", what).replace("{saved}", saved))
    assert not result.error
    return [said.message for said in result.reported if "cannot be written" in said.message]


@pytest.mark.parametrize(("what", "saved"), STATES.values(), ids=STATES.keys())
def test_states_are_written(what: str, saved: str) -> None:
    assert told(what, saved) == []


@pytest.mark.parametrize(("what", "saved"), HELD.values(), ids=HELD.keys())
def test_an_object_that_holds_an_optimizer_is_told(what: str, saved: str) -> None:
    (message,) = told(what, saved)
    assert message.endswith("save optimizer.inner.state_dict()")
