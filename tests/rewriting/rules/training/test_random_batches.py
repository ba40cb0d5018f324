"""Random batches are shared out; what is drawn with the size of a tensor that is there already goes with it."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """import torch

batch_size = 8
batch = 8


def mask_of(x):
    {size}
    return {drawn} < 0.5


model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), 0.1)
for step in range(10):
    x = torch.randn(batch_size, 4)
    loss = (model(x) * mask_of(x)).mean()
    loss.backward()
    opt.step()
"""


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ("batch, width = x.shape", "torch.rand(batch, width)"),
        ("batch, width, device = *x.shape, x.device", "torch.rand((batch, width), device=device)"),
        ("batch = x.size(0)", "torch.rand(batch, 1)"),
        ("batch_size = len(x)", "torch.rand(size=(batch_size, 1))"),
        ("b, *_ = x.shape\n    batch = b", "torch.rand(x.shape[0], 1)"),
    ],
)
def test_what_has_the_size_of_a_tensor_keeps_it(size: str, drawn: str) -> None:
    after = converted(SCRIPT.format(size=size, drawn=drawn))
    assert f"return {drawn} < 0.5" in after and "x = bmt.shard_batch(torch.randn(batch_size, 4))" in after


HANDED = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader


def pick(kept, bs, y=None):
    index = torch.randint(0, len(kept), (bs,))
    return kept[index]


def noise(bs):
    return torch.rand(bs, 4)


def samples(kept, y=None):
    {size}
    return pick(kept, {given}) + noise(bs)


model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), 0.1)
kept = torch.randn(40, 4)
for x, y in DataLoader(data, batch_size=options.batch_size):
    opt.zero_grad()
    F.mse_loss(model(x + samples(kept, y)), y).backward()
    opt.step()
"""


@pytest.mark.parametrize(
    ("size", "given"),
    [
        ("bs = y.size(0)", "bs"),
        ("bs = y.size(0)", "bs=bs, y=y"),
        ("bs = options.batch_size if y is None else y.size(0)", "bs"),
        ("bs = len(y)", "bs=bs"),
        ("bs = y.shape[0]", "y.shape[0]"),
    ],
)
def test_what_a_function_is_given_the_size_of_a_tensor_for_keeps_it(size: str, given: str) -> None:
    after = converted(HANDED.format(size=size, given=given))
    assert "index = torch.randint(0, len(kept), (bs,))" in after and "return torch.rand(bs, 4)" in after


def test_what_has_a_size_of_its_own_is_shared() -> None:
    after = converted(SCRIPT.format(size="pass", drawn="torch.rand(batch, 1).float()"))
    assert "bmt.shard_batch(torch.rand(batch, 1)).float() < 0.5" in after


def test_a_limit_that_is_a_length_is_no_size() -> None:
    after = converted(SCRIPT.format(size="limit = len(x)", drawn="torch.randint(limit, (batch, 1)).float()"))
    assert "bmt.shard_batch(torch.randint(limit, (batch, 1))).float() < 0.5" in after


PICKED = """import torch

x, y = torch.randn(100, 4), torch.randn(100, 1)
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), 0.1)
{before}
for step in range(10):
    {draw}
    loss = (model(a) - b).pow(2).mean()
    loss.backward()
    opt.step()
"""
PICK = "index = torch.randint({size})\n    a, b = x[index], y[index]"
BATCH = "def batch(n=12):\n    index = torch.randint({size})\n    return x[index], y[index]\n"


def picked(before: str, draw: str) -> str:
    return converted(PICKED.format(before=before, draw=draw))


@pytest.mark.parametrize(
    "text",
    [
        ("", PICK.format(size="len(x), (12,)")),
        ("", PICK.format(size="0, len(x), (12,)")),
        ("", PICK.format(size="len(x), size=(many,)")),
        (BATCH.format(size="len(x), (12,)"), "a, b = batch()"),
        (BATCH.format(size="len(x), (n,)"), "a, b = batch(12)"),
        ("loader = torch.utils.data.DataLoader(x)\n" + BATCH.format(size="len(x), (12,)"), "a, b = batch()"),
        ("", "index = torch.randint(90, (12,))\n    a, b = torch.stack([x[i] for i in index]), 0"),
    ],
)
def test_what_picks_a_batch_of_any_size_is_shared(text: tuple[str, str]) -> None:
    assert "index = bmt.shard_batch(torch.randint(" in picked(*text)


@pytest.mark.parametrize(
    "text",
    [
        ("", PICK.format(size="len(x), (1,)")),
        ("", PICK.format(size="len(x), (12, 3)")),
        ("", "a = x\n    t = torch.randint(10, (12,))\n    b = t.float()"),
        ("", "a, b = x, y\n    if step == 5:\n        index = torch.randint(100, (9,))\n        show(x[index])"),
        ("index = torch.randint(100, (9,))\nshow(x[index])", "a, b = x, y"),
        (
            "class Data:\n    def __getitem__(self, i):\n"
            "        index = torch.randint(90, (9,))\n        return x[index]\n",
            "a, b = Data()[step]",
        ),
    ],
)
def test_what_picks_something_else_stays(text: tuple[str, str]) -> None:
    assert "shard_batch" not in picked(*text)


FILLED = """import numpy as np
import torch

np.random.seed(0)
rows = np.random.randn(100, 4)


def batch(n):
    {lines}


net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), 0.1)
for step in range(10):
    x = batch(8)
    opt.zero_grad()
    net(torch.from_numpy(x).float()).pow(2).mean().backward()
    opt.step()
"""
DRAW = "at = np.random.randint(100, size=n)"


@pytest.mark.parametrize(
    "lines",
    [
        f"x = np.zeros([n, 4])\n    {DRAW}\n    for i in range(n):\n        x[i] = rows[at[i]]\n    return x",
        f"{DRAW}\n    return np.stack([rows[at[i]] for i in range(n)])",
        f"x = np.empty((n, 4))\n    {DRAW}\n    for i, j in enumerate(at):\n        x[i] = rows[j]\n    return x",
        f"{DRAW}\n    x = rows[at]\n    for i in range(0, n):\n        x[i] *= np.random.rand()\n    return x",
    ],
)
def test_positions_that_a_whole_batch_is_filled_by_stay(lines: str) -> None:
    assert "shard_batch(np.random.randint" not in converted(FILLED.format(lines=lines))


@pytest.mark.parametrize("given", ["rows[at]", "np.stack([rows[i] for i in at])"])
def test_positions_that_a_batch_is_made_of_are_shared(given: str) -> None:
    after = converted(FILLED.format(lines=f"{DRAW}\n    return {given}"))
    assert f"at = bmt.shard_batch({DRAW[5:]})" in after


LOADED = """import torch
from torch.utils.data import DataLoader, TensorDataset

batch = 8
data = TensorDataset(torch.randn(32, 6, 3), torch.randn(32, 6, 3))
loader = DataLoader(data, batch_size=batch, shuffle=True)
model = torch.nn.Linear(3, 3)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in loader:
    {size}
    noise = {drawn}
    loss = (model(x + noise) - y).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ("B, T, N = x.shape", "torch.rand((B, T, N))"),
        ("B, T, N = x.size()", "torch.randn(B, T, N)"),
        ("B, *rest = x.shape", "torch.randn(B, *rest)"),
        ("shape = x.shape\n    B, T, N = shape", "torch.randn(B, T, N)"),
        ("B, T, N = list(x.shape)", "torch.randn(B, T, N)"),
        ("B, T = len(x), 6", "torch.randn(B, T, 3)"),
        ("batch_size, length, _ = x.shape", "torch.randn(batch_size, length, 3)"),
        ("x = x.float()\n    B, T, N = x.shape", "torch.rand((B, T, N)).to(x.device)"),
    ],
)
def test_noise_has_the_size_of_a_share(size: str, drawn: str) -> None:
    after = converted(LOADED.format(size=size, drawn=drawn))
    assert "shard_batch" not in after and "shard_loader" in after


def test_noise_of_a_size_beside_one_that_is_read() -> None:
    after = converted(LOADED.format(size="B, T = 8, x.shape[1]", drawn="torch.randn(B, T, 3)"))
    assert "noise = bmt.shard_batch(torch.randn(B, T, 3))" in after
