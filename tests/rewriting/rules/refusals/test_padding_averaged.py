# ruff: noqa: E501 - tables of code are easier to read on one line
"""Means over positions of which each batch has as many as its longest are told of; what leaves the padding out is not."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import converted

SCRIPT = """import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)
sizes = [2, 9, 3, 4, 8, 2, 5, 3, 7, 6, 2, 4]


class Data(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        x = (torch.arange(1, sizes[i] + 1) * 7 + i) % 19 + 1
        y = (x * 3) % 5 + 1
        {item}


{collate}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.embed(x))


net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.5)
{more}
for {names} in DataLoader(Data(), batch_size=4{given}):
{body}
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
FIXED = "x, y = (torch.cat([t, torch.zeros(10 - len(t), dtype=torch.long)]) for t in (x, y))\n        return x, y"
SIZED = FIXED.replace("return x, y", "return x, y, (x != 0).sum()")
PADS = "def collate(items):\n    xs, ys = zip(*items)\n    return pad_sequence(xs, batch_first=True), pad_sequence(ys, batch_first=True)\n\n\n"
BY_HAND = "def collate(items):\n    n = max(len(x) for x, _ in items)\n    x = torch.zeros(len(items), n, dtype=torch.long)\n    y = torch.zeros(len(items), n, dtype=torch.long)\n    for i, (a, b) in enumerate(items):\n        x[i, :len(a)] = a\n        y[i, :len(b)] = b\n    return x, y\n\n\n"
LISTS = "def collate(items):\n    return tuple(zip(*items))\n\n\n"
KEYS = (
    PADS.replace("return pad", "return {'x': pad")
    .replace(", pad_sequence(ys", ", 'y': pad_sequence(ys")
    .replace("True)\n\n", "True)}\n\n")
)
LABELS = PADS.replace("pad_sequence(ys, batch_first=True)", "torch.stack([t[0] for t in ys])")
IGNORED = PADS.replace("pad_sequence(ys, batch_first=True)", "pad_sequence(ys, batch_first=True, padding_value=-100)")
IN_LOOP = "x = pad_sequence(xs, batch_first=True)\ny = pad_sequence(ys, batch_first=True)\n"
ALL = "loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())"
EACH = "each = F.cross_entropy(net(x).transpose(1, 2), y, reduction='none')\nmask = (y != 0).float()\n"


def script(body: str, collate: str = PADS, item: str = "return x, y", names: str = "x, y", more: str = "") -> str:
    given = ", collate_fn=collate" if collate else ""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return SCRIPT.format(item=item, collate=collate, given=given, names=names, body=lines.rstrip(), more=more)


TOLD = {
    "flattened": script(ALL),
    "viewed": script("out = net(x)\nloss = F.cross_entropy(out.view(-1, 6), y.view(-1))"),
    "turned": script("loss = F.cross_entropy(net(x).transpose(1, 2), y)"),
    "by a module": script(ALL.replace("F.cross_entropy", "criterion"), more="criterion = nn.CrossEntropyLoss()"),
    "padded by hand": script(ALL, BY_HAND),
    "padded in the loop": script(IN_LOOP + ALL, LISTS, names="xs, ys"),
    "cut to the longest": script(f"n = (x != 0).sum(1).max()\nx, y = x[:, :n], y[:, :n]\n{ALL}", "", FIXED),
    "cut to lengths": script(f"x, y = x[:, : n.max()], y[:, : n.max()]\n{ALL}", "", SIZED, "x, y, n"),
    "of numbers": script("loss = F.mse_loss(net(x)[..., 0], y.float())"),
    "masked, over all": script(f"{EACH}loss = (each * mask).mean()"),
    "by key": script(f"x, y = b['x'], b['y']\n{ALL}", KEYS, names="b"),
    "as columns": script(ALL, PADS.replace(", batch_first=True", "")),
    "the next": script("loss = F.cross_entropy(net(x[:, :-1]).flatten(0, 1), y[:, 1:].flatten())"),
    "in a function": script(
        "loss = step(x, y)", more="def step(x, y):\n    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())\n"
    ),
}
NOT_TOLD = {
    "one length": script(ALL, "", FIXED),
    "left out": script(ALL.replace("flatten())", "flatten(), ignore_index=0)")),
    "left out by a module": script(
        ALL.replace("F.cross_entropy", "criterion"), more="criterion = nn.CrossEntropyLoss(ignore_index=0)"
    ),
    "each item by itself": script(f"{EACH}loss = ((each * mask).sum(1) / mask.sum(1)).mean()"),
    "the first position": script("loss = F.cross_entropy(net(x)[:, 0], y[:, 0])"),
    "a label for each": script("loss = F.cross_entropy(net(x)[:, 0], y)", LABELS),
    "left out in the loop": script(
        IN_LOOP + ALL.replace("flatten())", "flatten(), ignore_index=0)"), LISTS, names="xs, ys"
    ),
}

MOVED = {
    "list comp to": script(f"x, y = [t.to(device) for t in batch]\n{ALL}", names="batch"),
    "gen comp": script(f"x, y = (t.to(device) for t in batch)\n{ALL}", names="batch"),
    "tuple(map)": script(f"x, y = tuple(map(lambda t: t.to(device), batch))\n{ALL}", names="batch"),
    "map": script(f"x, y = map(lambda t: t.to(device), batch)\n{ALL}", names="batch"),
    "map method": script(f"x, y = map(torch.Tensor.long, batch)\n{ALL}", names="batch"),
    "dict comp": script(
        f"b = {{k: v.to(device) for k, v in b.items()}}\nx, y = b['x'], b['y']\n{ALL}", KEYS, names="b"
    ),
    "dict(gen)": script(
        f"b = dict((k, v.to(device)) for k, v in b.items())\nx, y = b['x'], b['y']\n{ALL}", KEYS, names="b"
    ),
    "dict comp if": script(
        f"b = {{k: v.to(device) if torch.is_tensor(v) else v for k, v in b.items()}}\nx, y = b['x'], b['y']\n{ALL}",
        KEYS,
        names="b",
    ),
    "dict loop": script(f"for k in b:\n    b[k] = b[k].to(device)\nx, y = b['x'], b['y']\n{ALL}", KEYS, names="b"),
    "helper": script(
        f"x, y = to_device(batch, device)\n{ALL}",
        names="batch",
        more="def to_device(batch, device):\n    return [t.to(device) for t in batch]\n",
    ),
    "helper rec": script(
        f"b = to_device(b, device)\nx, y = b['x'], b['y']\n{ALL}",
        KEYS,
        names="b",
        more="def to_device(obj, device):\n    if isinstance(obj, dict):\n        return {k: to_device(v, device) for k, v in obj.items()}\n    if isinstance(obj, (list, tuple)):\n        return type(obj)(to_device(v, device) for v in obj)\n    return obj.to(device)\n",
    ),
    "helper rec list": script(
        f"x, y = to_device(batch, device)\n{ALL}",
        names="batch",
        more="def to_device(obj, device):\n    if isinstance(obj, dict):\n        return {k: to_device(v, device) for k, v in obj.items()}\n    if isinstance(obj, (list, tuple)):\n        return [to_device(v, device) for v in obj]\n    return obj.to(device)\n",
    ),
    "star": script(
        "loss = step(*batch)",
        names="batch",
        more="def step(x, y):\n    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())\n",
    ),
    "star moved": script(
        "loss = step(*[t.to(device) for t in batch])",
        names="batch",
        more="def step(x, y):\n    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())\n",
    ),
    "kw star": script(
        "loss = step(**{k: v.to(device) for k, v in b.items()})",
        KEYS,
        names="b",
        more="def step(x, y):\n    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())\n",
    ),
    "kw star plain": script(
        "loss = step(**b)",
        KEYS,
        names="b",
        more="def step(x, y):\n    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())\n",
    ),
    "get": script(f"y = b.get('y')\nx = b.get('x')\n{ALL}", KEYS, names="b"),
    "zip keys": script(f"x, y = [b[k].to(device) for k in ('x', 'y')]\n{ALL}", KEYS, names="b"),
    "values": script(f"x, y = b.values()\n{ALL}", KEYS, names="b"),
    "values comp": script(f"x, y = [v.cuda() for v in b.values()]\n{ALL}", KEYS, names="b"),
    "itemgetter": script(f"x, y = itemgetter('x', 'y')(b)\n{ALL}", KEYS, names="b"),
    "tree_map": script(f"x, y = tree_map(lambda t: t.to(device), batch)\n{ALL}", names="batch"),
    "method": script(
        f"x, y = tool.move(batch)\n{ALL}",
        names="batch",
        more="class Tool:\n    def move(self, batch):\n        return [t.to(device) for t in batch]\n\n\ntool = Tool()\n",
    ),
    "in step fn": script(
        "loss = step(batch)",
        names="batch",
        more="def step(batch):\n    x, y = [t.to(device) for t in batch]\n    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())\n",
    ),
}
NOT_MOVED = {
    "labels moved": script(
        "x, y = [t.to(device) for t in batch]\nloss = F.cross_entropy(net(x)[:, 0], y)", LABELS, names="batch"
    ),
    "labels moved dict": script(
        "b = {k: v.to(device) for k, v in b.items()}\nloss = F.cross_entropy(net(b['x'])[:, 0], b['y'])",
        KEYS.replace("pad_sequence(ys, batch_first=True)", "torch.stack([t[0] for t in ys])"),
        names="b",
    ),
    "left out moved": script(
        "x, y = [t.to(device) for t in batch]\n" + ALL.replace("flatten())", "flatten(), ignore_index=0)"),
        names="batch",
    ),
    "labels map": script(
        "x, y = map(lambda t: t.to(device), batch)\nloss = F.cross_entropy(net(x)[:, 0], y)", LABELS, names="batch"
    ),
    "labels helper": script(
        "x, y = to_device(batch, device)\nloss = F.cross_entropy(net(x)[:, 0], y)",
        LABELS,
        names="batch",
        more="def to_device(batch, device):\n    return [t.to(device) for t in batch]\n",
    ),
    "one length moved": script(f"x, y = [t.to(device) for t in batch]\n{ALL}", "", FIXED, names="batch"),
    "item mean": script(
        "x, y = [t.to(device) for t in batch]\n" + f"{EACH}loss = ((each * mask).sum(1) / mask.sum(1)).mean()",
        names="batch",
    ),
}


def told(text: str) -> list[str]:
    result = convert_text(text, Options())
    assert not result.error and result.changed
    lines = text.splitlines()
    return [lines[f.line - 1].strip() for f in result.reported if "padded to its longest" in f.message]


@pytest.mark.parametrize("text", (TOLD | MOVED).values(), ids=(TOLD | MOVED).keys())
def test_a_mean_over_padding_is_told(text: str) -> None:
    (line,) = told(text)
    assert "cross_entropy(" in line or "criterion(" in line or "mse_loss(" in line or "mean()" in line


@pytest.mark.parametrize("text", (NOT_TOLD | NOT_MOVED).values(), ids=(NOT_TOLD | NOT_MOVED).keys())
def test_what_is_no_mean_over_padding_is_not(text: str) -> None:
    assert not told(text)


def test_labels_that_torch_leaves_out_are_told_by_any_name() -> None:
    found = [finding.message for finding in convert_text(script(ALL, IGNORED)).reported]
    assert any("more labels of -100" in message for message in found)


def test_labels_that_every_loss_counts_are_not() -> None:
    counts = ALL.replace("flatten())", "flatten(), ignore_index=-100)")
    found = [finding.message for finding in convert_text(script(counts, IGNORED)).reported]
    assert not any("more labels of -100" in message for message in found)
    plain = counts + "\nloss = loss + F.cross_entropy(net(x)[:, 0], y[:, 0])"
    found = [finding.message for finding in convert_text(script(plain, IGNORED)).reported]
    assert any("more labels of -100" in message for message in found)


# On two ranks: what is told is so ----------------------------------------------------------------------------------


def play(text: str) -> float:
    given = {"__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return float(sum(value.double().square().sum() for value in given["net"].state_dict().values()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("flattened", True),
        ("cut to the longest", True),
        ("masked, over all", True),
        ("one length", False),
        ("left out", False),
        ("each item by itself", False),
        ("left out in the loop", False),
    ],
)
def test_the_ranks_differ_where_it_is_told(name: str, differs: bool) -> None:
    text = (TOLD | NOT_TOLD)[name]
    (one,) = run_ranks(1, play, text, initialize=False, fresh=True)
    two = run_ranks(2, play, converted(text), initialize=False, fresh=True)
    assert two[0] == two[1] and (two[0] != pytest.approx(one, rel=1e-5)) == differs
