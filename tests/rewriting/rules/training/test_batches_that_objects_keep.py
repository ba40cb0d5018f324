"""Numbers that are made of a batch which an object has kept: of a rank's share."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.types import Remark

from ...helpers import IMPORTS, NET

SCRIPT = (
    IMPORTS
    + NET
    + """
class Learner:
    def __init__(self):
        self.net = Net()
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def set_input(self, x, y):
        self.x, self.y = x.to(device), y
        self.lr = 0.1

    def step(self):
        self.out = self.net(self.x)
        self.loss = F.cross_entropy(self.out, self.y)
        self.opt.zero_grad()
        self.loss.backward()
        self.opt.step()

    def told(self):
        return {told}


learner = Learner()
for x, y in DataLoader(data, batch_size=8):
    learner.set_input(x, y)
    learner.step()
{behind}
"""
)


def reported(told: str, behind: str) -> list[str]:
    found = convert_text(SCRIPT.format(told=told, behind=behind)).reported
    return [item.message for item in found if isinstance(item, Remark) and "object keeps" in item.message]


LEFT = {
    "a loss": ("self.loss.item()", "print(learner.told())"),
    "a number": ("float(self.lr)", ""),
    "a kind": ("self.x.device", "print(learner.x.dtype)"),
    "rows": ("self.out", ""),
    "the first row": ("self.out[0].sum().item()", ""),
    "another object's": ("other.out.sum().item()", ""),
}


@pytest.mark.parametrize(("told", "behind"), LEFT.values(), ids=LEFT.keys())
def test_other_numbers_are_not_reported(told: str, behind: str) -> None:
    assert reported(told, behind) == []


NUMBERS = {
    "hits": ("(self.out.argmax(1) == self.y).float().mean().item()", ""),
    "of what comes in": ("float(self.x.mean())", ""),
    "a list": ("self.out.argmax(1).tolist()", ""),
    "an array": ("self.out.detach().numpy()", ""),
    "outside": ("0", "print(learner.out.std().item())"),
}


@pytest.mark.parametrize(("told", "behind"), NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_the_share_are_reported(told: str, behind: str) -> None:
    assert len(reported(told, behind)) == 1


def test_what_the_loop_itself_keeps() -> None:
    text = (
        IMPORTS
        + NET
        + """
class Trainer:
    def fit(self, net, opt):
        for x, y in DataLoader(data, batch_size=8):
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            self.last = x

net = Net()
trainer = Trainer()
trainer.fit(net, torch.optim.SGD(net.parameters(), lr=0.1))
print(trainer.last.sum().item())
"""
    )
    (told,) = (item for item in convert_text(text).reported if "object keeps" in getattr(item, "message", ""))
    assert "trainer.last.sum().item()" in getattr(told, "message", "")


# What is read by others, as callbacks do --------------------------------------------------------------------------

CALLBACKS = (
    IMPORTS
    + NET
    + """
class Counter:
    def __init__(self):
        self.seen = self.hits = 0

    def after_batch(self, {runner}):
        {body}


class Runner:
    def __init__(self, loader, callbacks):
        self.net, self.loader, self.callbacks, self.lr = Net(), loader, callbacks, 0.1
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def one(self, x, y):
        self.x, self.y = x, y
        self.out = self.net(self.x)
        self.loss = F.cross_entropy(self.out, self.y)
        self.opt.zero_grad()
        self.loss.backward()
        self.opt.step()
        for callback in self.callbacks:
            getattr(callback, "after_batch")(self)

    def fit(self):
        for x, y in self.loader:
            self.one(x, y)


runner = Runner(DataLoader(data, batch_size=8), [Counter()])
runner.fit()
{behind}
"""
)
TOLD_BY_OTHERS = {
    "hits": ("self.hits += (runner.out.argmax(1) == runner.y).sum().item()", ""),
    "a size": ("self.seen += len(runner.y)", ""),
    "another size": ("self.seen += runner.x.size(0)", ""),
    "a size by name": ("n = runner.x.shape[0]; self.seen += n", ""),
    "a metric": ("self.hits += metric(runner.out, runner.y) * 2", ""),
    "a name": ("right = runner.out.argmax(1) == runner.y; self.hits += right.sum()", ""),
    "a list": ("rows.extend(runner.out.tolist())", ""),
    "shown": ("print(runner.out.std().item())", ""),
    "behind": ("pass", "print(runner.out)"),
    "kept behind": ("pass", "torch.save(runner.out, 'out.pt')"),
}
LEFT_TO_OTHERS = {
    "a loss": ("self.hits += runner.loss.item()", ""),
    "a number": ("self.hits += runner.lr", ""),
    "a step": ("self.seen += 1", ""),
    "another object": ("self.hits += (runner.other == runner.y).sum().item()", ""),
    "weights": ("self.hits += runner.net.head.weight.sum().item()", ""),
    "a kind behind": ("pass", "print(runner.out.dtype)"),
}


def told_of_callbacks(body: str, behind: str, runner: str = "runner") -> list[str]:
    body = "\n        ".join(body.split("; "))
    found = convert_text(CALLBACKS.format(body=body, behind=behind, runner=runner)).reported
    return [item.message for item in found if isinstance(item, Remark) and "object keeps" in item.message]


@pytest.mark.parametrize(("body", "behind"), LEFT_TO_OTHERS.values(), ids=LEFT_TO_OTHERS.keys())
def test_what_others_read_that_is_no_batch(body: str, behind: str) -> None:
    assert told_of_callbacks(body, behind) == []


def test_a_batch_of_the_same_names_is_no_object_that_keeps_one() -> None:
    assert told_of_callbacks("self.hits += batch.y.sum().item()", "", runner="batch") == []


@pytest.mark.parametrize(("body", "behind"), TOLD_BY_OTHERS.values(), ids=TOLD_BY_OTHERS.keys())
def test_what_others_read_of_a_kept_batch_is_reported(body: str, behind: str) -> None:
    assert len(told_of_callbacks(body, behind)) == 1
