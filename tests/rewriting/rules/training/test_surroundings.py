"""Numbers around a loop that whole scripts keep: in tables, counts of meters, lists of dicts, counts by class."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.rewriting.helpers import converted, printed
from tests.runtime.ranks import run_ranks

HEAD = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Meter:
    def __init__(self):
        self.sum = self.count = 0

    def update(self, value, n=1):
        self.sum += value * n
        self.count += n

    @property
    def avg(self):
        return self.sum / self.count


class Tracker:
    def __init__(self):
        self.rows = {}

    def track(self, **kw):
        for k, v in kw.items():
            self.rows.setdefault(k, []).append(v)


class Bar:
    def __init__(self, it):
        self.it = it

    def __iter__(self):
        return iter(self.it)


def metrics_of(out, y):
    return {"accuracy": float((out.argmax(1) == y).sum()) / float(len(y))}


torch.manual_seed(0)
data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
loader = DataLoader(data, batch_size=6)
net = nn.Linear(4, 3)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
meter = Meter()
tracker = Tracker()
bar = Bar(loader)
logs, seen = [], 0
ema = None
counts = torch.zeros(3, dtype=torch.long)
for x, y in {loader}:
    out = net(x)
    loss = nn.functional.cross_entropy(out, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    {use}
{end}
"""
GIVEN = """def summarize(out, y, loss):
    return {"loss": loss.item(), "acc": (out.argmax(1) == y).float().mean().item(), "n": len(y), "first": y[0].item()}


def show(text, **kw):
    line = text + " ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in kw.items())
    print(line)


torch.manual_seed"""
FORWARD = """class Net(nn.Linear):
    def forward(self, x):
        h = super().forward(x)
        self.act = {made}
        return h


torch.manual_seed"""
CASES = {
    "a table by names": (
        "tracker.track(loss=loss.item(), error=(out - 1).abs().mean().item(), n=len(x))",
        "print({k: [round(v, 4) for v in row] for k, row in tracker.rows.items()})",
    ),
    "the count of a meter": (
        'meter.update(loss.item(), x.size(0))\n    print(f"{meter.avg:.4f} {meter.count}")',
        "print(meter.count)",
    ),
    "the sum of a meter": ('meter.update(loss.item(), x.size(0))\n    print(f"{meter.sum:.4f}")', "print()"),
    "a list of dicts": (
        'entry = {"loss": loss.item(), "acc": (out.argmax(1) == y).float().mean().item(), "n": int((y > 0).sum())}\n'
        "    logs.append(entry)\n    print({k: round(v, 4) for k, v in entry.items()})",
        'print([entry["n"] for entry in logs])',
    ),
    "counts by class": ("counts += torch.bincount(y, minlength=3)", "print(counts.tolist(), counts.sum().item())"),
    "a dict of a function": (
        's = summarize(out, y, loss)\n    ema = s["loss"] if ema is None else 0.8 * ema + 0.2 * s["loss"]\n'
        '    show("step ", ema=ema, acc=s["acc"], n=len(x), m=s["n"], first=s["first"])',
        "print(round(ema, 4))",
    ),
    "an object that wraps the loader": ("seen += len(x)", "print(seen)"),
}


def script(name: str) -> str:
    use, end = CASES[name]
    loader = "bar" if "wraps" in name else "loader"
    head = HEAD.replace("torch.manual_seed", GIVEN) if "summarize" in use else HEAD
    return head.replace("{use}", use).replace("{end}", end).replace("{loader}", loader)


def test_a_dict_that_a_function_gives_is_told() -> None:
    use = 'm = metrics_of(out, y)\n    m["loss"] = loss.item()\n    logs.append(m)'
    text = HEAD.replace("{use}", use).replace("{end}", "print(logs)").replace("{loader}", "loader")
    assert "gather_samples(m)" not in converted(text)
    assert any("this rank's share" in finding.message for finding in convert_text(text).reported)


@pytest.mark.parametrize(
    ("made", "is_told"),
    [("h.mean().item()", True), ("h.detach()", False), ("self.weight.norm().item()", False)],
    ids=["a number of the batch", "a tensor", "a number of weights"],
)
def test_a_number_that_a_forward_keeps_is_told(made: str, is_told: bool) -> None:
    text = HEAD.replace("torch.manual_seed", FORWARD.replace("{made}", made)).replace("nn.Linear(4, 3)", "Net(4, 3)")
    text = text.replace("{use}", "print(net.act)").replace("{end}", "").replace("{loader}", "loader")
    said = [finding.message for finding in convert_text(text).reported]
    assert any("in a forward is of this rank's share" in message for message in said) == is_told


def test_a_number_that_is_handed_to_what_is_not_seen_is_told() -> None:
    use = "library.track(error=(out - 1).abs().mean().item())"
    text = HEAD.replace("{use}", use).replace("{end}", "").replace("{loader}", "loader")
    assert any("is of this rank's share" in finding.message for finding in convert_text(text).reported)


def test_averages_alone_need_no_count_of_all_ranks() -> None:
    use = 'meter.update(loss.item(), x.size(0))\n    print(f"{meter.avg:.4f}")'
    text = HEAD.replace("{use}", use).replace("{end}", "").replace("{loader}", "loader")
    assert "bmt.total" not in converted(text)


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name: str) -> None:
    text = script(name)
    assert not any("share" in finding.message for finding in convert_text(text).reported)
    wanted = printed(text)
    first, second = run_ranks(2, printed, converted(text), initialize=False, fresh=True)
    assert first == wanted and not any(second)
