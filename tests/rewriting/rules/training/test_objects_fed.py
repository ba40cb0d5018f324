"""Objects of the project's that add up what a loop gives them: what they show is to be of all ranks."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader


class Base:
    def __init__(self):
        self.sum, self.n, self.all, self.table = 0, 0, [], {}

    def value(self):
        return self.sum / self.n


class Meter(Base):
    METHOD


net = torch.nn.Linear(4, 2)
opt = torch.optim.Adam(net.parameters())
loader = DataLoader(data, batch_size=8)
m = Meter()
"""
LOOP = """for step, (x, y) in enumerate(loader):
    out = net(x)
    loss = F.cross_entropy(out, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    hits = (out.argmax(1) == y).sum().item()
"""
AVERAGE = "def update(self, v, n=1):\n        self.last = v\n        self.sum += v * n\n        self.n += n"
ACCURACY = "def __call__(self, out, y):\n        self.sum += out.argmax(1).eq(y).sum()\n        self.n += len(y)"


def script(method: str, use: str) -> str:
    return f"{HEAD.replace('METHOD', method)}{LOOP}    {use}\nprint(m.value())\n"


MADE = {
    "an averager of its own": (
        "def add(self, v):\n        self.sum += v.data.sum()\n        self.n += v.numel()",
        "m.add(loss)",
        "m.add(bmt.sum_loss(loss))",
    ),
    "a weighed loss": (AVERAGE, "m.update(loss, len(x))", "m.update(bmt.sum_loss(loss), len(x))"),
    "by keyword": (AVERAGE, "m.update(v=loss.data, n=len(x))", "m.update(v=bmt.sum_loss(loss).data, n=len(x))"),
    "counts": (
        "def count(self, k, n):\n        self.sum += k\n        self.n += n",
        "m.count(hits, len(y))",
        "m.count(bmt.total(hits), bmt.total(len(y)))",
    ),
    "called": (ACCURACY, "m(out.detach(), y)", "m(bmt.gather_samples(out.detach()), bmt.gather_samples(y))"),
    "its value taken": (
        f"{ACCURACY}\n        return self.sum",
        "a = m(out.detach(), y)",
        "a = m(bmt.gather_samples(out.detach()), bmt.gather_samples(y))",
    ),
    "listed": ("def record(self, v):\n        self.all.append(v)", "m.record(loss)", "m.record(bmt.sum_loss(loss))"),
    "lists joined": (
        "def store(self, v):\n        self.all = self.all + v",
        "m.store(y.tolist())",
        "m.store(bmt.gather_samples(y.tolist()))",
    ),
    "by another method": (
        "def put(self, v):\n        self._put(v)\n\n    def _put(self, w):\n        self.sum += w",
        "m.put(loss)",
        "m.put(bmt.sum_loss(loss))",
    ),
    "a dict": (
        "def note(self, row):\n        for k, v in row.items():\n            self.table[k] += v",
        "m.note({'loss': loss, 'hits': hits})",
        "m.note({'loss': bmt.sum_loss(loss), 'hits': bmt.total(hits)})",
    ),
}


@pytest.mark.parametrize(("method", "use", "wanted"), MADE.values(), ids=MADE.keys())
def test_what_is_given_is_made_the_batchs(method: str, use: str, wanted: str) -> None:
    assert f"    {wanted}\n" in converted(script(method, use))


UNKNOWN = {
    "outputs, of which it is not seen what they are": (ACCURACY, "m(out, y)"),
    "each of a list": (ACCURACY, "for one in metrics:\n        one(out, y)"),
    "each of a list, all known but the class": (ACCURACY, "for one in metrics:\n        one(out.detach(), y)"),
    "what a function makes": ("def note(self, v):\n        self.sum += v", "m.note(score(out, y))"),
}


@pytest.mark.parametrize(("method", "use"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_is_not_known_is_reported(method: str, use: str) -> None:
    result = convert_text(script(method, use))
    assert f"    {use}\n" in result.after.decode()
    assert "BMT037" in {finding.code for finding in result.reported}


QUIET = {
    "a step": (AVERAGE, "m.update(step)"),
    "a rate": (AVERAGE, "m.update(opt.param_groups[0]['lr'])"),
    "what is only held": ("def show(self, v):\n        self.last = v", "m.show(out)"),
    "a loss of an object that trains": (
        "def put(self, v):\n        self.sum += v\n\n    def end(self):\n        self.sum.backward()",
        "m.put(loss)",
    ),
    "a layer": (ACCURACY.replace("self.sum +=", "self.sum ="), "net(x)"),
}


@pytest.mark.parametrize(("method", "use"), QUIET.values(), ids=QUIET.keys())
def test_what_is_no_share_stays(method: str, use: str) -> None:
    result = convert_text(script(method, use))
    assert f"    {use}\n" in result.after.decode()
    assert "BMT037" not in {finding.code for finding in result.reported}


STEP = """def train(net, criterion):
    x, y = it.__next__()
    n = x.size(0)
    cost = criterion(net(x), y) / n
    opt.zero_grad()
    cost.backward()
    opt.step()
    return cost


criterion = torch.nn.CTCLoss(reduction="sum")
criterion = criterion.cuda()
it = iter(loader)
for step in range(len(loader)):
    cost = train(net, criterion)
    USE
"""


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        ("m.update(cost)", "m.update(bmt.sum_loss(cost))"),
        ("t += cost.item()", "t += bmt.sum_loss(cost).item()"),
        ("print('%f' % cost)", "'%f' % bmt.sum_loss(cost)"),
    ],
)
def test_a_loss_that_a_function_returns(use: str, wanted: str) -> None:
    assert wanted in converted(HEAD.replace("METHOD", AVERAGE) + STEP.replace("USE", use))


@pytest.mark.parametrize(("divided", "differs"), [(" / n", False), ("", True)])
def test_a_criterion_that_is_handed_on(divided: str, differs: bool) -> None:
    text = HEAD.replace("METHOD", AVERAGE) + STEP.replace("USE", "pass").replace(" / n", divided)
    result = convert_text(text)
    assert (
        "BMT091" in {finding.code for finding in result.reported} or "world_size()" in result.after.decode()
    ) is differs
