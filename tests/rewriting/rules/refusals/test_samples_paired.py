# ruff: noqa: E501 - tables of code are easier to read on one line
"""Batches whose samples are paired with each other, of which a rank's share makes other pairs, are told; others are not."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import converted

SCRIPT = """import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.dataloader import default_collate

{head}
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
for x, y in DataLoader(data, batch_size=12{more}):
    z = x
{body}
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
LOSS = "loss = F.cross_entropy(net(z), y)"


def script(body: str, head: str = "", more: str = "") -> str:
    lines = body if "loss =" in body or "loss.backward" in body else f"{body}\n{LOSS}"
    return SCRIPT.format(head=head, more=more, body="".join(f"    {line}\n" for line in lines.splitlines()))


def told(text: str) -> list[str]:
    """The lines of a script by which it is told that samples are paired."""
    result = convert_text(text, Options())
    assert not result.error and result.changed
    return [text.splitlines()[f.line - 1].strip() for f in result.reported if "paired with each other" in f.message]


IN_A_LOOP = {
    "flip": "z = 0.7 * x + 0.3 * x.flip(0)\nout = net(z)\nloss = 0.7 * F.cross_entropy(out, y) + 0.3 * F.cross_entropy(out, y.flip(0))",
    "flip labels only": "out = net(x)\nloss = 0.7 * F.cross_entropy(out, y) + 0.3 * F.cross_entropy(out, y.flip(0))",
    "flip dims": "z = 0.7 * x + 0.3 * torch.flip(x, dims=[0])",
    "flip list": "z = x.lerp(x.flip([0]), 0.3)",
    "in place": "z = x.flip(0).mul_(0.3)\nx.mul_(0.7).add_(z)\nloss = F.cross_entropy(net(x), y)",
    "roll": "z = 0.7 * x + 0.3 * x.roll(1, 0)",
    "roll kw": "z = 0.7 * x + 0.3 * torch.roll(x, shifts=1, dims=0)",
    "numpy": "z = 0.7 * x + 0.3 * torch.from_numpy(x.numpy()[::-1].copy())",
    "arange": "n = len(x)\nidx = torch.arange(n - 1, -1, -1)\nz = 0.7 * x + 0.3 * x[idx]",
    "halves": "a, b = x.chunk(2)\nz = 0.7 * a + 0.3 * b\nloss = F.cross_entropy(net(z), y[: len(a)])",
    "cut": "x[:, 1:3] = x.flip(0)[:, 1:3]\nloss = F.cross_entropy(net(x), y)",
    "perm": "idx = torch.randperm(x.size(0))\nz = 0.7 * x + 0.3 * x[idx]",
    "negatives": "h = net(x)\nloss = F.triplet_margin_loss(h, h * 0.9, h.roll(1, 0))",
    "one half": "a, b = torch.split(x, len(x) // 2)\nz = torch.cat([0.5 * (a + b), a], 0)",
    "slices": "h = len(x) // 2\nz = 0.5 * (x[:h] + x[h:])\nloss = F.cross_entropy(net(z), y[:h])",
    "strided": "z = net(x[::2]) - net(x[1::2])\nloss = z.pow(2).mean()",
    "cutmix": "idx = torch.randperm(x.size(0))\nx[:, 1:3] = x[idx, 1:3]\nloss = F.cross_entropy(net(x), y) + F.cross_entropy(net(x), y[idx])",
    "argsort": "idx = torch.rand(x.size(0)).argsort()\nz = x + x[idx]",
    "numpy perm": "idx = np.random.permutation(len(x))\nz = x + x[idx]",
    "shifted": "n = x.shape[0]\nidx = (torch.arange(n) + 1) % n\nz = x + x[idx]",
    "list": "idx = list(range(len(x)))[::-1]\nz = x + x[idx]",
    "comprehension": "idx = [i - 1 for i in range(len(x))]\nz = x + x[idx]",
    "index_select": "z = x + x.index_select(0, torch.arange(len(x) - 1, -1, -1))",
    "cat roll": "z = x + torch.cat([x[1:], x[:1]])",
    "where": "z = torch.where(x > 0, x, x.flip(0))",
    "in place slice": "x[:] = 0.5 * x + 0.5 * x.flip(0)\nz = x",
    "dict": "b = {'x': x, 'y': y}\nz = b['x'] + b['x'].flip(0)",
    "under a test": "z = x\nif np.random.rand() < 0.5:\n    z = x + torch.flip(x, (0,))",
    "shuffled list": "idx = list(range(len(x)))\nrandom.shuffle(idx)\nz = x + x[idx]",
    "stacked": "z = torch.stack([x, x.flip(0)], 1).mean(1)",
    "of logits": "out = net(x)\nloss = F.cross_entropy(out, y) + F.mse_loss(out, out.roll(1, 0))",
    "flipud": "z = x + torch.flipud(x)",
    "losses in a list": "parts = []\nparts.append(F.cross_entropy(net(x), y.flip(0) * 0 + y))\nloss = sum(parts)",
    "no name": "loss = F.cross_entropy(net(x * 0.7 + x.flip(0) * 0.3), y)",
    "einsum weights": "lam = torch.rand(len(x), 1)\nz = lam * x + (1 - lam) * x.flip(0)",
}
ELSEWHERE = {  # what the script has in front, and what its loop does
    "a helper": (
        "def mix(x, y, lam=0.7):\n    idx = torch.arange(x.size(0)).flip(0)\n    return lam * x + (1 - lam) * x[idx], y, y[idx], lam\n",
        "z, ya, yb, lam = mix(x, y)\nout = net(z)\nloss = lam * F.cross_entropy(out, ya) + (1 - lam) * F.cross_entropy(out, yb)",
    ),
    "a helper that draws": (
        "def mix(x, y, alpha=0.2):\n    lam = np.random.beta(alpha, alpha)\n    n = x.size()[0]\n    index = torch.randperm(n)\n    mixed = lam * x + (1 - lam) * x[index, :]\n    a, b = y, y[index]\n    return mixed, a, b, lam\ndef crit2(f, p, a, b, lam):\n    return lam * f(p, a) + (1 - lam) * f(p, b)\nce = nn.CrossEntropyLoss()\n",
        "z, a, b, lam = mix(x, y)\nloss = crit2(ce, net(z), a, b, lam)",
    ),
    "a class": (
        "class Mix:\n    def __call__(self, x, y):\n        return 0.5 * (x + x.roll(1, 0)), y\nmixer = Mix()\n",
        "z, y = mixer(x, y)",
    ),
    "a method": (
        "class Mix:\n    def run(self, x):\n        return 0.5 * (x + x.roll(1, 0))\nmixer = Mix()\n",
        "z = mixer.run(x)",
    ),
    "in a step": (
        "def step(x, y):\n    z = x + x.flip(0)\n    loss = F.cross_entropy(net(z), y)\n    loss.backward()\n    return loss\n",
        "loss = step(x, y)",
    ),
    "a model": (
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.a = nn.Linear(4, 3)\n    def forward(self, x):\n        h = self.a(x)\n        return h + 0.1 * h.flip(0)\nnet2 = Net()\n",
        "loss = F.cross_entropy(net2(x), y)",
    ),
    "a loss module": (
        "class Rank(nn.Module):\n    def forward(self, h, y):\n        d = h - h.roll(1, 0)\n        return d.pow(2).mean()\nrank = Rank()\n",
        "loss = rank(net(x), y)",
    ),
    "a lambda": ("mix = lambda t: 0.5 * (t + t.flip(0))\n", "z = mix(x)"),
    "a library's": ("from torchvision.transforms import v2\nmix = v2.MixUp(num_classes=3)\n", "z, y = mix(x, y)"),
    "timm's": ("from timm.data import Mixup\nmix = Mixup(num_classes=3)\n", "z, y = mix(x, y)"),
}
ENCODER = """class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 8)
        self.two = nn.Linear(8, 3)

    def forward(self, x):
        is_list = isinstance(x, (tuple, list))
        if is_list:
            n = x[0].shape[0]
            x = torch.cat(x, dim=0)
        x = torch.relu(self.one(x))
        x = self.two(x)
        if is_list:
            x = {split}
        return x


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def forward(self, one, two):
        a, b = self.encoder([one, two])
        return a - {b}


flow = Flow()
"""
SPLITS = [
    "torch.split(x, [n, n], dim=0)",
    "torch.split(x, n)",
    "x.chunk(2)",
    "torch.chunk(x, 2, dim=0)",
    "x[:n], x[n:]",
]
ALONE = {
    "flip -1": "z = x + x.flip(-1)",
    "flip 1": "z = x + torch.flip(x, [1])",
    "roll 1": "z = x + x.roll(1, 1)",
    "shuffled together": "p = torch.randperm(len(x))\nx, y = x[p], y[p]\nz = x",
    "flipped together": "x, y = x.flip(0), y.flip(0)\nz = x",
    "time first": "t = x.transpose(0, 1)\nz = (t + t.flip(0)).transpose(0, 1)",
    "time first t": "t = x.t()\nz = (t + t.flip(0)).t()",
    "channels": "a, b = x.chunk(2, dim=1)\nz = torch.cat([a + b, a * b], 1)",
    "channels -1": "a, b = x.chunk(2, -1)\nz = torch.cat([a + b, a * b], 1)",
    "micro-batches": "loss = 0\nfor a, b in zip(x.chunk(2), y.chunk(2)):\n    loss = loss + F.cross_entropy(net(a), b) / 2",
    "gather logits": "out = F.log_softmax(net(x), -1)\nloss = -out[torch.arange(len(y)), y].mean()",
    "sorted": "order = y.argsort()\nout = net(x[order])\nback = order.argsort()\nloss = F.cross_entropy(out[back], y)",
    "evaluation": "z = x\nwith torch.no_grad():\n    print((net(x) - net(x).flip(0)).abs().max() > -1)",
    "one sample": "s = x[0]\nz = x + s.flip(0)",
    "a mask": "z = x\nkeep = y == 1\nloss = F.cross_entropy(net(x)[keep], y[keep]) if keep.any() else net(x).sum() * 0",
    "two parts": "loss = F.cross_entropy(net(x[:4]), y[:4]) + F.cross_entropy(net(x[4:]), y[4:])",
    "of all": "loss = F.cross_entropy(net(torch.cat([x, x.flip(1)])), torch.cat([y, y]))",
    "two views that may be one": "v, both = x, True\nif both:\n    v = torch.cat([x, x * 2])\nv = net(v)\nif both:\n    a, b = v.chunk(2)\nelse:\n    a = b = v\nloss = F.mse_loss(a, b)",
    "two views that may be one, split": "v, both = [x, x * 2], True\nn = len(x)\nif both:\n    v = torch.cat(v, dim=0)\nv = net(v)\nif both:\n    v = torch.split(v, [n, n], dim=0)\nloss = F.mse_loss(v[0], v[1])",
    "two views that may be one, sliced": "v, both = x, True\nn = len(x)\nif both:\n    v = torch.cat([x, x * 2], 0)\nv = net(v)\nif both:\n    loss = F.mse_loss(v[:n], v[n:])\nelse:\n    loss = v.mean()",
    "two views": "v = torch.cat([x, x * 2])\na, b = net(v).chunk(2)\nloss = F.mse_loss(a, b)",
    "weights": "w = net[0].weight\nz = x + (w - w.flip(0)).pow(2).mean()",
    "a table where the batch is": "t = torch.randint(0, 2, (x.size(0),)); z = x * table.to(x.device)[t][:, None]",
    "a table of its kind": "t = torch.randint(0, 2, (x.size(0),)); z = x * table.to(device=x.device, dtype=x.dtype)[t][:, None]",
    "a table like it": "t = torch.randint(0, 2, (x.size(0),)); z = x * table.to(x)[t][:, None]",
    "a table typed as it": "t = torch.randint(0, 2, (x.size(0),)); z = x * table.type_as(x)[t][:, None]",
    "a new table": "t = torch.randint(0, 2, (x.size(0),)); z = x * x.new_tensor([1.0, 2.0])[t][:, None]",
    "a table made there": "t = torch.randint(0, 2, (x.size(0),)); z = x * torch.linspace(0, 1, 2, device=x.device)[t][:, None]",
    "a table by index_select": "t = torch.randint(0, 2, (x.size(0),)); z = x * table.to(x.device).index_select(0, t)[:, None]",
}
MIXUP = """class RandomMixup(torch.nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.p = p
    def forward(self, batch, target):
        if not self.p:
            batch = batch.clone()
        if target.ndim == 1:
            target = F.one_hot(target, 3).to(dtype=batch.dtype)
        batch_rolled = batch.roll(1, 0)
        target_rolled = target.roll(1, 0)
        lam = 0.3
        batch_rolled.mul_(1.0 - lam)
        batch.mul_(lam).add_(batch_rolled)
        target_rolled.mul_(1.0 - lam)
        target.mul_(lam).add_(target_rolled)
        return batch, target
mix = RandomMixup()
"""
COLLATED = {
    "by a function": (
        "def collate(items):\n    xs, ys = zip(*items)\n    x = torch.stack(xs)\n    return x * 0.5 + x.flip(0) * 0.5, torch.stack(ys)\n",
        "collate",
        1,
    ),
    "by a module": (MIXUP + "def collate(items):\n    return mix(*default_collate(items))\n", "collate", 2),
    "by a lambda": (MIXUP, "lambda items: mix(*default_collate(items))", 2),
    "as columns": (
        "def collate(items):\n    xs, ys = zip(*items)\n    return torch.stack(xs, 1), torch.stack(ys)\n",
        "collate",
        0,
    ),
    "as padded columns": (
        "def collate(items):\n    xs, ys = zip(*items)\n    return torch.nn.utils.rnn.pad_sequence(xs), torch.stack(ys)\n",
        "collate",
        0,
    ),
}


@pytest.mark.parametrize("body", IN_A_LOOP.values(), ids=IN_A_LOOP.keys())
def test_pairs_of_a_batch_are_told(body: str) -> None:
    assert told(script(body))


@pytest.mark.parametrize(("head", "body"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_pairs_made_elsewhere_are_told(head: str, body: str) -> None:
    assert told(script(body, head))


@pytest.mark.parametrize(("head", "collate", "lines"), COLLATED.values(), ids=COLLATED.keys())
def test_pairs_made_where_batches_are(head: str, collate: str, lines: int) -> None:
    assert len(told(script("z = x + 0 * x.flip(1)", head, f", collate_fn={collate}"))) == lines


@pytest.mark.parametrize(
    "head", ["def collate(items):\n    return torch.stack(items, 1)\n", "from own import collate\n"]
)
def test_what_a_loader_may_lay_side_by_side_is_not_told(head: str) -> None:
    assert not told(script("z = x + x.flip(0)", head, ", collate_fn=collate"))


@pytest.mark.parametrize("body", ALONE.values(), ids=ALONE.keys())
def test_what_samples_have_alone_is_not_told(body: str) -> None:
    assert not told(script(body))


def test_a_dataset_that_turns_its_samples() -> None:
    head = "class Data(torch.utils.data.Dataset):\n    def __getitem__(self, i):\n        im = torch.randn(3, 4)\n        return im + im.flip(0), 0\n"
    assert not told(script("z = x", head))


def test_the_line_is_the_one_that_moves() -> None:
    assert told(script("w = x.flip(0)\nz = x + w")) == ["w = x.flip(0)"]


def test_a_script_that_gathers_first() -> None:
    after = converted(script("z = x + x.flip(0)")).replace("x.flip(0)", "bmt.shard_batch(bmt.gather_batch(x).flip(0))")
    assert not [f for f in convert_text(after, Options()).reported if "paired" in f.message]


# On several ranks: what is told is so, and what to write helps ------------------------------------------------------


def play(text: str) -> float:
    given = {"__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return float(sum(value.double().sum() for value in given["net"].state_dict().values()))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["flip dims", "arange", "halves", "cut"])
def test_the_ranks_differ_where_it_is_told(name: str) -> None:
    text = script(IN_A_LOOP[name])
    (one,) = run_ranks(1, play, text, initialize=False, fresh=True)
    two = run_ranks(2, play, converted(text), initialize=False, fresh=True)
    assert two[0] == two[1] and two[0] != pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("move", ["x.flip(0)", "x.roll(1, 0)"])
def test_what_is_moved_of_all_ranks_is_right(move: str, ranks: int) -> None:
    text = script(f"z = 0.7 * x + 0.3 * {move}")
    (one,) = run_ranks(1, play, text, initialize=False, fresh=True)
    after = converted(text).replace(move, f"bmt.shard_batch({move.replace('x.', 'bmt.gather_batch(x).')})")
    assert run_ranks(ranks, play, after, initialize=False, fresh=True) == pytest.approx([one] * ranks, rel=1e-6)


@pytest.mark.parametrize("name", ["flipped together", "channels"])
def test_the_ranks_agree_where_nothing_is_told(name: str) -> None:
    text = script(ALONE[name])
    (one,) = run_ranks(1, play, text, initialize=False, fresh=True)
    assert run_ranks(2, play, converted(text), initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_images_that_go_through_an_encoder_together_are_not_paired(split: str) -> None:
    body = "out = flow(x, 2 * x)\nloss = out.pow(2).mean()"
    assert not told(script(body, ENCODER.format(split=split, b="b")))
    (line,) = told(script(body, ENCODER.format(split=split, b="b.flip(0)")))
    assert "b.flip(0)" in line
