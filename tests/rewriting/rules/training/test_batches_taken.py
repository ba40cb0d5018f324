"""Batches that a script takes by itself: by positions drawn with any library, and by slices of a shuffled order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rewriter.convert import convert_text
from rewriter.report import FIRST, READY, launch
from rewriter.types import Result
from rewriter.verify.script.prove import Settings, prove
from rewriter.verify.script.runs import Command, Host

from ...helpers import converted

HEAD = """import random

import numpy as np
import torch
from torch import nn

torch.manual_seed(1)
n, b = 24, 8
x = torch.randn(n, 6)
y = x.sum(1, keepdim=True).sin()
rows = list(zip(x, y))
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
{before}
for step in range(3):
    {draw}
{loop}    loss = nn.functional.mse_loss(model(xb), yb)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("loss", loss.item(), len(yb))
"""
TAKE = "\nxb, yb = x[ix], y[ix]"


def script(draw: str, before: str = "") -> str:
    """A loop that takes a batch at random on every pass."""
    return HEAD.format(before=before, draw=draw.replace("\n", "\n    "), loop="")


def epochs(draw: str, loop: str, before: str = "") -> str:
    """A loop over the batches of an order, within one over epochs."""
    head, _, body = HEAD.partition("{loop}")
    inner = body.replace("\n    ", "\n        ")
    return head.format(before=before, draw=draw) + f"    {loop}" + "\n    " + inner.replace("{loop}", "")


def last(text: str) -> tuple[Result, str]:
    result = replace(convert_text(text), path=Path("train.py"))
    assert not result.error
    return result, launch([result], lambda path: path)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


DRAWN = {
    "choice": "ix = np.random.choice(n, b)",
    "choice without repetition": "ix = np.random.choice(len(x), size=b, replace=False)",
    "choice of a list": "ix = np.random.choice(np.arange(n), 8)",
    "randint": "ix = np.random.randint(0, n, b)",
    "randint, a size": "ix = np.random.randint(n, size=(b,))",
    "sample": "ix = random.sample(range(n), b)",
    "choices": "ix = random.choices(range(n), k=b)",
    "multinomial": "ix = torch.multinomial(torch.ones(n), b)",
    "a generator": "ix = rng.integers(0, n, b)",
    "a generator's choice": "ix = rng.choice(n, b, replace=False)",
    "a generator as it was": "ix = old.randint(0, n, b)",
    "a generator of Python": "ix = own.sample(range(n), b)",
    "the first of an order": "ix = torch.randperm(n)[:b]",
    "sorted": "ix = sorted(random.sample(range(n), b))",
    "the first of numpy's": "ix = np.random.permutation(n)[:b]",
}
GENERATORS = "rng = np.random.default_rng(3)\nold = np.random.RandomState(3)\nown = random.Random(3)"


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_positions_are_shared_out(draw: str) -> None:
    text = script(draw + "\nxb, yb = x[ix], y[ix]", GENERATORS)
    inner = draw.removeprefix("ix = ").removeprefix("sorted(")
    after = converted(text)
    assert f"bmt.shard_batch({inner})\n" in after or f"sorted(bmt.shard_batch({inner[:-1]}))\n" in after
    assert last(text)[1].startswith(READY)


OTHER = {
    "taken where they are drawn": "xb = x[torch.randperm(n)[:b]]\nyb = xb",
    "of arrays": "ix = np.random.choice(n, b)\nxb = torch.from_numpy(x.numpy()[ix])\nyb = xb",
    "one by one": "ix = np.random.choice(n, b)\nxb = yb = torch.stack([x[i] for i in ix])",
    "by numpy, of torch": "ix = torch.from_numpy(np.random.randint(0, n, b))\nxb = yb = x[ix]",
    "items": "batch = random.sample(rows, b)\nxb = yb = torch.stack([r[0] for r in batch])",
}


@pytest.mark.parametrize("draw", OTHER.values(), ids=OTHER)
def test_positions_in_other_places(draw: str) -> None:
    assert converted(script(draw)).count("bmt.shard_batch(") == 1


SLICES = {
    "torch's": ("order = torch.randperm(n)", "for i in range(0, n, b):\n        ix = order[i : i + b]"),
    "numpy's": ("order = np.random.permutation(n)", "for i in range(0, n, b):\n        ix = order[i : i + b]"),
    "shuffled": ("random.shuffle(order)", "for i in range(0, n, b):\n        ix = order[i : i + b]"),
    "by number": (
        "order = np.random.permutation(n)",
        "for i in range(n // b):\n        ix = order[i * b : (i + 1) * b]",
    ),
}


@pytest.mark.parametrize(("draw", "loop"), SLICES.values(), ids=SLICES)
def test_slices_of_an_order_are_shared_out(draw: str, loop: str) -> None:
    text = epochs(draw, loop + "\n        xb, yb = x[ix], y[ix]", "order = list(range(n))")
    assert "        ix = bmt.shard_batch(order[i" in converted(text)
    assert last(text)[1].startswith(READY)


PARTS = {
    "split": "torch.randperm(n).split(b)",
    "chunk": "order.chunk(3)",
    "rows": "np.random.permutation(n).reshape(-1, b)",
    "array_split": "np.array_split(order, 3)",
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_parts_of_an_order_are_shared_out(parts: str) -> None:
    text = epochs("order = torch.randperm(n)", f"for i, ix in enumerate({parts}):\n        xb, yb = x[ix], y[ix]")
    assert f"for i, ix in enumerate(map(bmt.shard_batch, {parts})):" in converted(text)


def test_what_follows_an_order_is_shared_out() -> None:
    loop = "for i in range(0, n, b):\n        xb, yb = xs[i : i + b], ys[i : i + b]"
    after = converted(epochs("order = torch.randperm(n); xs, ys = x[order], y[order]", loop))
    assert "xb, yb = bmt.shard_batch(xs[i : i + b]), bmt.shard_batch(ys[i : i + b])" in after


FUNCTIONS = {
    "a function": ("def take():\n    ix = np.random.choice(n, b)\n    return x[ix], y[ix]\n", "xb, yb = take()"),
    "its argument": (
        "def take(k=8):\n    ix = random.sample(range(n), k)\n    return x[ix], y[ix]\n",
        "xb, yb = take()",
    ),
}


@pytest.mark.parametrize(("function", "call"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_that_give_a_batch(function: str, call: str) -> None:
    assert "    ix = bmt.shard_batch(" in converted(script(call, function))


GENERATOR = """def batches():
    order = np.random.permutation(n)
    for i in range(0, n, b):
        ix = order[i : i + b]
        yield x[ix], y[ix]
"""


def test_generators_of_batches() -> None:
    text = epochs("pass", "for xb, yb in batches():", GENERATOR)
    assert "        ix = bmt.shard_batch(order[i : i + b])\n" in converted(text)


OF_ARGUMENTS = """def batches(a, c, size{more}):
    order = {order}
    for i in range(0, len(a), size):
        ix = order[i : i + size]
        yield a[ix], c[ix]
"""


@pytest.mark.parametrize(
    ("more", "order"),
    [
        ("", "torch.randperm(len(a))"),
        ("", "np.random.permutation(a.shape[0])"),
        (", shuffle=True", "np.random.permutation(len(a)) if shuffle else np.arange(len(a))"),
    ],
)
def test_an_order_of_what_a_function_is_given_is_the_same_on_all_ranks(more: str, order: str) -> None:
    function = OF_ARGUMENTS.format(more=more, order=order)
    after = converted(epochs("pass", "for xb, yb in batches(x, y, b):", function))
    assert f"    order = {order}\n" in after and "own_random" not in after
    assert "        ix = bmt.shard_batch(order[i : i + size])\n" in after


LEFT = {
    "a generator without a seed": ("ix = rng.integers(0, n, b)" + TAKE, "rng = np.random.default_rng()"),
    "None for a seed": ("ix = rng.integers(0, n, b)" + TAKE, "rng = np.random.default_rng(None)"),
    "the time for a seed": ("ix = rng.sample(range(n), b)" + TAKE, "import time\nrng = random.Random(time.time())"),
    "an option that may be None": (
        "ix = rng.integers(0, n, b)" + TAKE,
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--seed', type=int)\n"
        "args = p.parse_args()\nrng = np.random.default_rng(args.seed)",
    ),
    "two numbers of items": (
        "ix = np.random.choice(n, b)\niy = np.random.choice(n, 4)" + TAKE + "\nz = x[iy]",
        "",
    ),
    "under a test": (
        "if step % 2:\n        ix = np.random.choice(n, b)\n        xb, yb = x[ix], y[ix]",
        "xb, yb = x, y",
    ),
    "one item": ("xb, yb = x[step], y[step]", ""),
    "all of the data": ("xb, yb = x, y", ""),
    "in a class": (
        "xb, yb = memory.take()",
        "class Memory:\n    def take(self):\n        return tuple(map(torch.stack, zip(*random.sample(rows, 8))))\n"
        "\n\nmemory = Memory()",
    ),
}


@pytest.mark.parametrize(("draw", "before"), LEFT.values(), ids=LEFT)
def test_what_is_not_shared_out_is_said_at_the_end(draw: str, before: str) -> None:
    result, line = last(script(draw, before))
    assert b"shard_batch" not in result.after
    assert line.startswith(FIRST) and "BMT023" in {found.code for found in result.reported}


FOLDS = """import torch
from torch.utils.data import DataLoader, Subset

torch.manual_seed(0)


def folds(n):
    order = torch.randperm(n).tolist()
    for i in range(3):
        held = order[i * 4:(i + 1) * 4]
        yield [j for j in order if j not in held], held


def fit(train, test):
    model = torch.nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in train:
        loss = model(x).mean()
        loss.backward()
        optimizer.step()


for k, (a, b) in enumerate(folds(12)):
    fit(DataLoader(Subset(data, a), batch_size=4), DataLoader(Subset(data, b)))
"""


def test_folds_are_no_batches() -> None:
    result = convert_text(FOLDS)
    assert b"shard_batch" not in result.after and b"bmt.shard_loader(DataLoader(Subset(data, a)" in result.after
    assert not any("shard_batch" in finding.message for finding in result.reported)


def test_slices_of_data_in_their_order_are_said() -> None:
    result, line = last(epochs("pass", "for i in range(0, n, b):\n        xb, yb = x[i : i + b], y[i : i + b]"))
    (found,) = [found for found in result.reported if found.code == "BMT023"]
    number = next(i for i, text in enumerate(result.before.decode().splitlines(), 1) if "x[i : i + b]" in text)
    assert "write bmt.shard_batch(x[i:i + b])" in found.message and found.line == number
    assert line.startswith(f"{FIRST}see to train.py:{number}")


LOADED = {
    "negatives": "for xb, yb in DataLoader(rows, batch_size=8):\n        z = x[np.random.choice(n, 5)]",
    "labels": "for xb, yb in DataLoader(rows, batch_size=8):\n        z = np.random.randint(0, 3, len(xb))",
}


@pytest.mark.parametrize("loop", LOADED.values(), ids=LOADED)
def test_what_is_drawn_beside_a_loaders_batch_stays(loop: str) -> None:
    after = converted("from torch.utils.data import DataLoader\n" + epochs("pass", loop))
    assert "shard_batch" not in after and "bmt.shard_loader(" in after


def test_a_loader_that_only_evaluates_shares_nothing() -> None:
    text = script("xb, yb = next(source)", "source = iter(rows)") + (
        "with torch.no_grad():\n    for xb, yb in torch.utils.data.DataLoader(rows, batch_size=8):\n"
        "        print(model(xb).mean())\n"
    )
    assert last(text)[1].startswith(FIRST)


MADE = {
    "a count": ("seen += len(yb)", "seen += bmt.total(len(yb))"),
    "hits": ("seen += (model(xb) > yb).sum().item()", "seen += bmt.total((model(xb) > yb).sum().item())"),
    "predictions": ("out.extend(yb.tolist())", "out.extend(bmt.gather_samples(yb.tolist()))"),
}


@pytest.mark.parametrize(("line", "wanted"), MADE.values(), ids=MADE)
@pytest.mark.parametrize("draw", ["np.random.choice(n, b)", "torch.randint(n, (b,))", "torch.randperm(n)[:b]"])
def test_what_is_made_of_a_share_is_the_batchs(line: str, wanted: str, draw: str) -> None:
    after = converted(script(f"ix = {draw}{TAKE}", "seen, out = 0, []") + f"    {line}\n")
    assert f"    {wanted}\n" in after


def test_a_sum_over_the_batch_is_the_whole_batchs() -> None:
    text = script("ix = np.random.choice(n, b)" + TAKE).replace("(xb), yb)", '(xb), yb, reduction="sum")')
    assert "optim_manager.backward(loss * bmt.world_size())" in converted(text)


BATCH = "ix = np.random.choice(n, b)" + TAKE


@pytest.mark.parametrize("line", ["xb = xb + torch.randn(b, 6)", "yb = yb + torch.zeros(b, 1)", "xb = xb.view(b, 6)"])
def test_a_size_of_the_whole_batch_is_reported(line: str) -> None:
    result, said = last(script(f"{BATCH}\n{line}"))
    assert [f.line for f in result.reported if "fewer than b items" in f.message] == [18] and said.startswith(FIRST)


def test_noise_for_a_share_is_each_ranks_own() -> None:
    after = converted(script(f"{BATCH}\nxb = xb + torch.randn_like(xb)"))
    assert "    with bmt.own_random():\n        xb = xb + torch.randn_like(xb)\n" in after


def test_a_batch_whose_items_are_compared_stays_whole() -> None:
    text = script(BATCH).replace(
        "nn.functional.mse_loss(model(xb), yb)", "(model(xb) @ model(xb).T).logsumexp(1).mean()"
    )
    result, said = last(text)
    (found,) = result.reported
    assert b"shard_batch" not in result.after and said.startswith(FIRST)
    assert found.code == "BMT023" and "compared with each other in line 18" in found.message


EARLY = {
    "an order": "order = np.random.permutation(n)",
    "data": "data = torch.randn(n, 6)",
    "data of a function": "def made():\n    return torch.rand(n, 6)\n\n\ndata = made()",
    "a division": "part, rest = torch.utils.data.random_split(rows, [20, 4])",
}


@pytest.mark.parametrize("line", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize("main", [False, True])
def test_what_is_drawn_before_the_model_is_drawn_by_ranks_that_are_seeded_alike(line: str, main: bool) -> None:
    head, _, body = script(BATCH).replace("torch.manual_seed(1)\n", "").partition("x = torch.randn(n, 6)\n")
    body = body.replace("torch.randn", "torch.zeros")
    if main:
        body = (
            "def main():\n    "
            + body.rstrip().replace("\n", "\n    ")
            + "\n\n\nif __name__ == '__main__':\n    main()\n"
        )
    after = converted(f"{head}x = torch.zeros(n, 6)\n{line}\n{body}")
    assert f"bmt.init_distributed()\n{line.splitlines()[-1]}\n" in after


@pytest.mark.parametrize(
    "line", ["part = torch.utils.data.random_split(rows, [20, 4], generator=made)", "seed = random.randint(1, 9)"]
)
def test_what_has_a_seed_of_its_own_is_drawn_where_it_was(line: str) -> None:
    text = script(BATCH).replace("torch.manual_seed(1)\n", "").replace("x = torch.randn(n, 6)\n", f"x = {{}}\n{line}\n")
    assert f"x = {{}}\n{line}\n" in converted(text)


RUN = {
    "positions": script("ix = np.random.choice(n, b)" + TAKE),
    "an order": epochs("order = torch.randperm(n)", SLICES["torch's"][1] + "\n        xb, yb = x[ix], y[ix]"),
    "parts": epochs("pass", "for ix in torch.randperm(n).split(b):\n        xb, yb = x[ix], y[ix]"),
    "a generator": epochs("pass", "for xb, yb in batches():", GENERATOR),
}


@pytest.mark.parametrize("name", [n if n == "an order" else pytest.param(n, marks=pytest.mark.long) for n in RUN])
def test_two_ranks_do_what_one_process_does(host: Host, tmp_path: Path, name: str) -> None:
    text = RUN[name].replace("torch.manual_seed(1)", "torch.manual_seed(1)\nnp.random.seed(1)")
    for folder, code in (("original", text), ("converted", converted(text))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.py").write_text(code)
    command = Command((("train.py",),), None, 60.0)
    report = prove(Settings(tmp_path / "original", tmp_path / "converted", command, (2,)), host)
    assert report.held, report.findings
    assert report.outcomes[0].samples
