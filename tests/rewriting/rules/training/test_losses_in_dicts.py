# ruff: noqa: E501 - tables of code are easier to read on one line
"""Losses that a function or model gives by name or place: those of the batch, wherever a loop or hook reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import converted

HEAD = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from collections import defaultdict

torch.manual_seed(0)
X = torch.randn(24, 6)
Y = (X[:, 0] > 0).long()
loader = DataLoader(TensorDataset(X, Y), batch_size=12)
model = nn.Linear(6, 2)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
shown, sums, lists, rows = [], defaultdict(float), defaultdict(list), []


def losses_of(x, y):
    out = model(x)
    return {"ce": F.cross_entropy(out, y), "reg": 0.1 * out.pow(2).mean()}


def pair_of(x, y):
    out = model(x)
    ce, reg = F.cross_entropy(out, y), out.pow(2).mean()
    return ce + 0.1 * reg, ce.detach(), reg.detach()


for x, y in loader:
"""
STEP = "    opt.zero_grad()\n    loss.backward()\n    opt.step()\n"
BY_NAME = "    losses = losses_of(x, y)\n    loss = losses['ce'] + losses['reg']\n"
PARTS = "    loss, ce, reg = pair_of(x, y)\n"
READ = {
    "added by name": (BY_NAME, "for k, v in losses.items():\n        sums[k] += v.item()", "sums[k] += bmt.sum_loss(v.item())"),
    "collected by name": (BY_NAME, "for k, v in losses.items():\n        lists[k].append(v.detach().cpu().item())", "bmt.sum_loss(v.detach().cpu().item())"),
    "one by name": (BY_NAME, "sums['ce'] += losses['ce'].item()", "+= bmt.sum_loss(losses['ce'].item())"),
    "a row": (BY_NAME, "rows.append({k: v.item() for k, v in losses.items()})", "{k: bmt.sum_loss(v.item()) for k, v in losses.items()}"),
    "shown": (BY_NAME, "print({k: round(v.item(), 4) for k, v in losses.items()})", "round(bmt.sum_loss(v.item()), 4)"),
    "joined": (BY_NAME, "print(', '.join(f'{k} {v.item():.4f}' for k, v in losses.items()))", "{bmt.sum_loss(v.item()):.4f}"),
    "beside names": (PARTS, "for k, v in zip(['loss', 'ce', 'reg'], (loss, ce, reg)):\n        sums[k] += v.item()", "sums[k] += bmt.sum_loss(v.item())"),
    "by place": (PARTS, "sums['reg'] += reg.item()", "+= bmt.sum_loss(reg.item())"),
    "stacked": (PARTS, "rows.append(torch.stack([loss, ce, reg]).detach())", "bmt.sum_loss(torch.stack([loss, ce, reg]).detach())"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "read", "wanted"), READ.values(), ids=READ.keys())
def test_parts_of_a_loss_are_the_batch_s(make: str, read: str, wanted: str) -> None:
    result = convert_text(f"{HEAD}{make}{STEP}    {read}\n")
    assert wanted in result.after.decode() and not any(found.differs for found in result.reported)  # type: ignore[union-attr]


def test_keys_of_a_batch_are_not_those_of_losses() -> None:
    text = f"{HEAD.replace('for x, y in', 'for batch in')}    x, y = batch['x'], batch['y']\n{PARTS}{STEP}"
    result = convert_text(f"{text}    for k, v in batch.items():\n        sums[k] += v.sum().item()\n")
    assert any(found.differs for found in result.reported)  # type: ignore[union-attr]


# What models and functions give at a place, of batches without a loader --------------------------------------------

DRAWN = """import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
ids = torch.randint(0, 9, (200,))
batch_size = 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, x, y=None):
        out = self.head(self.emb(x))
        loss = None
        if y is not None:
            loss = F.cross_entropy(out.view(-1, 9), y.view(-1))
        return out, loss


def get_batch():
    at = torch.randint(len(ids) - 5, (batch_size,))
    return torch.stack([ids[i:i + 4] for i in at]), torch.stack([ids[i + 1:i + 5] for i in at])


def loss_of():
    x, y = get_batch()
    return F.cross_entropy(net(x)[0].view(-1, 9), y.view(-1))


@torch.no_grad()
def estimate():
    losses, total = torch.zeros(3), torch.zeros(())
    for k in range(3):
        {read}
    return losses.mean() + total


net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
shown = []
for _ in range(2):
    shown.append(estimate().item())
    x, y = get_batch()
    _, loss = net(x, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
GIVEN = {
    "of a starred batch": "losses[k] = net(*get_batch())[1].item()",
    "as a number": "losses[k] = float(net(*get_batch())[1])",
    "a tensor that is added": "total += net(*get_batch())[1]",
    "a tensor that is put": "_, loss = net(*get_batch())\n        losses[k] = loss",
    "by index": "x, y = get_batch()\n        losses[k] = net(x, y)[1].item()",
    "of a function": "losses[k] = loss_of().item()",
    "by name": "_, v = net(*get_batch())\n        losses[k] = v.item()",
    "in a list": "losses = torch.tensor([net(*get_batch())[1].item() for _ in range(3)])",
}


def play(text: str) -> list[float]:
    given: dict[str, object] = {"__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return given["shown"]  # type: ignore[return-value]


@pytest.mark.parametrize("read", GIVEN.values(), ids=GIVEN.keys())
def test_what_a_model_gives_at_a_place_is_the_batch_s(read: str) -> None:
    text = DRAWN.replace("{read}", read)
    (one,) = run_ranks(1, play, text, initialize=False, fresh=True)
    after = converted(text)
    assert after.count("bmt.sum_loss(") == 1 and converted(after) == after
    for ranks in run_ranks(2, play, after, initialize=False, fresh=True):
        assert ranks == pytest.approx(one, rel=1e-4)


def test_an_action_is_no_loss() -> None:
    text = DRAWN.replace(
        "{read}", "action = int(net(ids[:4])[0].argmax().item())\n        total += net(ids[:4])[0].sum().item()"
    )
    assert "bmt.sum_loss" not in converted(text)


# In objects that hooks of another file read ------------------------------------------------------------------------

TRAINER = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from hooks import Log


class Trainer:
    def __init__(self, data):
        self.model = torch.nn.Linear(6, 2)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loader, self.hooks, self.state = DataLoader(data, batch_size=12), [Log()], {}

    def step(self, x, y):
        loss = F.cross_entropy(self.model(x), y)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return GIVES

    def fit(self):
        for x, y in self.loader:
            KEEPS
            for hook in self.hooks:
                hook.after(self)


Trainer(data).fit()
"""
HELD = {
    "an attribute": ("loss", "self.loss = self.step(x, y)", "trainer.loss"),
    "a name": ("loss", "now = self.step(x, y)\n            self.now = now", "trainer.now"),
    "without its graph": ("loss.detach()", "self.last = self.step(x, y)", "trainer.last"),
    "in a dict": ("{'loss': loss, 'n': len(x)}", "self.outputs = self.step(x, y)", "trainer.outputs['loss']"),
    "asked for": ("{'loss': loss}", "self.outputs = self.step(x, y)", "trainer.outputs.get('loss')"),
    "within": ("{'logs': {'loss': loss}}", "self.outputs = self.step(x, y)", "trainer.outputs['logs']['loss']"),
    "put in a dict": ("loss", "self.state['loss'] = self.step(x, y)", "trainer.state['loss']"),
    "of a tuple": ("loss, x", "self.loss, self.x = self.step(x, y)", "trainer.loss"),
    "by its name": ("loss", "setattr(self, 'current', self.step(x, y))", "trainer.current"),
}


@pytest.mark.parametrize(("gives", "keeps", "read"), HELD.values(), ids=HELD.keys())
def test_a_hook_reads_the_batch_s(gives: str, keeps: str, read: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINER.replace("GIVES", gives).replace("KEEPS", keeps))
    hook = f"class Log:\n    def after(self, trainer):\n        print({read}.item())\n"
    (tmp_path / "hooks.py").write_text(hook)
    results = convert_paths([tmp_path / "train.py", tmp_path / "hooks.py"], Options(), [tmp_path])
    assert f"print_rank(bmt.sum_loss({read}).item())".encode() in results[1].after
    (tmp_path / "hooks.py").write_text(hook.replace(".item()", ""))
    number = TRAINER.replace("GIVES", gives.replace("loss.detach()", "loss").replace("loss", "loss.item()", 1))
    if "'loss'" not in gives:
        (tmp_path / "train.py").write_text(number.replace("KEEPS", keeps))
        results = convert_paths([tmp_path / "train.py", tmp_path / "hooks.py"], Options(), [tmp_path])
        assert b"sum_loss" not in results[1].after and b"bmt.sum_loss(loss).item()" in results[0].after
