# ruff: noqa: E501 - tables of code are easier to read on one line
"""A test of a batch, in whatever code has it, is of the whole batch where it decides about what all ranks do."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from rewriter.types import Refusal

from ...helpers import converted

HEAD = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
"""
STEP = """    loss = F.mse_loss(net(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
"""
MAKE = """net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
train_loader = DataLoader(data, batch_size=8, shuffle=True)
"""
FUNCTION = (
    "def step(net, opt, x, y):\n{test}"
    + STEP
    + "    return loss\n\n\n"
    + MAKE
    + "for i, (x, y) in enumerate(train_loader):\n    step(net, opt, x, y)\n"
)
KEYWORDS = FUNCTION.replace("step(net, opt, x, y)\n", "step(net, opt, y=y, x=x)\n").replace(
    "def step(net, opt, y=y, x=x)", "def step(net, opt, x, y)"
)
TWO_DEEP = (
    "def inner(net, opt, x, y):\n{test}"
    + STEP
    + "\n\ndef outer(net, opt, batch):\n    x, y = batch\n    inner(net, opt, x, y)\n\n\n"
    + MAKE
    + "for batch in train_loader:\n    outer(net, opt, batch)\n"
)
GENERATOR = (
    "def steps_of(net, opt, loader):\n    for batch in loader:\n        x, y = batch\n"
    + "{test}".replace("{test}", "{inner}")
    + STEP.replace("    ", "        ")
    + "        yield loss\n\n\n"
    + MAKE
    + "for loss in steps_of(net, opt, train_loader):\n    print(loss.item())\n"
)
METHOD = (
    "class Trainer:\n    def __init__(self):\n        self.net = torch.nn.Linear(4, 1)\n        self.opt = torch.optim.Adam(self.net.parameters())\n        self.loader = DataLoader(data, batch_size=8)\n\n    def fit(self):\n        for x, y in self.loader:\n            self.step(x.to(device), y)\n\n    def step(self, x, y):\n{inner}"
    + STEP.replace("    ", "        ").replace("net(", "self.net(").replace("opt.", "self.opt.")
    + "\n\nTrainer().fit()\n"
)
UNPACKED = MAKE + "for i, batch in enumerate(train_loader):\n    x, y = batch\n{test}" + STEP
ZIPPED = MAKE + "for i, (x, y) in zip(range(9), train_loader):\n{test}" + STEP
PULLED = MAKE + "batches = iter(train_loader)\nwhile True:\n    x, y = next(batches)\n{test}" + STEP
WALRUS = (
    MAKE
    + "batches = iter(train_loader)\nwhile (batch := next(batches, None)) is not None:\n    x, y = batch\n{test}"
    + STEP
)
PLACES = {
    "function": FUNCTION, "keywords": KEYWORDS, "two deep": TWO_DEEP, "generator": GENERATOR, "method": METHOD, "unpacked": UNPACKED,
    "zipped": ZIPPED, "pulled": PULLED, "walrus": WALRUS,
}  # fmt: skip


def script(place: str, test: str, head: str = HEAD) -> str:
    text, leave = (
        PLACES[place],
        "return None" if place in {"function", "keywords", "two deep", "method"} else "continue",
    )
    lines = test.replace("LEAVE", leave).splitlines()
    inner = "".join(f"        {line}\n" for line in lines)
    return head + "\n\n" + text.format(test="".join(f"    {line}\n" for line in lines), inner=inner)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("test", "wanted"),
    [
        ("if len(x) < 2:\n    LEAVE", "if bmt.total(len(x)) < 2:"),
        ("if (y == 0).sum() == 0:\n    LEAVE", "if bmt.total((y == 0).sum()) == 0:"),
    ],
    ids=["size", "values"],
)
def test_it_is_of_the_whole_batch(place: str, test: str, wanted: str) -> None:
    assert wanted in converted(script(place, test))


WHOLE = {
    "a size": ("if x.size(0) < 2:\n    LEAVE", "if bmt.total(x.size(0)) < 2:"),
    "a shape": ("if 2 > x.shape[0]:\n    LEAVE", "if 2 > bmt.total(x.shape[0]):"),
    "a name": ("n = len(x)\nif n < 2:\n    LEAVE", "if bmt.total(n) < 2:"),
    "any": ("if torch.isnan(x).any():\n    LEAVE", "if bmt.total(torch.isnan(x).any()):"),
    "torch's any": ("if torch.any(y == 0).item():\n    LEAVE", "if bmt.total(torch.any(y == 0).item()):"),
    "not any": ("if not (y == 0).any():\n    LEAVE", "if not bmt.total((y == 0).any()):"),
    "a mask": ("keep = y > 0\nif keep.sum().item() == 0:\n    LEAVE", "if bmt.total(keep.sum().item()) == 0:"),
    "a count alone": ("if not (y == 0).sum():\n    LEAVE", "if not bmt.total((y == 0).sum()):"),
    "two": ("if len(x) < 2 or (y == 0).sum() == 0:\n    LEAVE", "if bmt.total(len(x)) < 2 or bmt.total((y == 0).sum()) == 0:"),
    "all": ("if (y == 0).all():\n    LEAVE", "if not bmt.total(not (y == 0).all()):"),
    "not all": ("if not torch.all(y == 0):\n    LEAVE", "if bmt.total(not torch.all(y == 0)):"),
    "each": ("if all(v > 0 for v in y):\n    LEAVE", "if not bmt.total(not all(v > 0 for v in y)):"),
    "a mean": ("if y.float().mean() < 0.1:\n    LEAVE", "if bmt.sum_loss(y.float().mean()) < 0.1:"),
    "counts compared": ("if (y == 0).sum() > (y == 1).sum():\n    LEAVE", "if bmt.total((y == 0).sum()) > bmt.total((y == 1).sum()):"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["function", "unpacked"])
@pytest.mark.parametrize(("test", "wanted"), WHOLE.values(), ids=WHOLE.keys())
def test_totals_and_means(place: str, test: str, wanted: str) -> None:
    assert wanted in converted(script(place, test))


@pytest.mark.parametrize("place", ["function", "generator", "method", "walrus"])
@pytest.mark.parametrize("test", ["x.abs().max() > 9", "x.norm() > 4", "len(set(y.tolist())) < 2", "y[0] == 0"])
def test_other_values_are_refused(place: str, test: str) -> None:
    result = convert_text(script(place, f"if {test}:\n    LEAVE"))
    assert not result.changed and [f.code for f in result.reported if isinstance(f, Refusal)] == ["BMT039"]


@pytest.mark.parametrize("place", ["function", "unpacked", "pulled"])
@pytest.mark.parametrize(
    "test", ["x.dim() == 3", "x.dtype == torch.half", "x is None", "isinstance(x, list)", "flag", "net.training"]
)
def test_what_kind_it_is_is_the_same_on_all_ranks(place: str, test: str) -> None:
    assert f"if {test}:" in converted(script(place, f"if {test}:\n    LEAVE"))


@pytest.mark.parametrize(
    "line", ["if len(x) < 2:\n    small = True", "if len(x) < 2:\n    raise ValueError(1)", "assert len(x) > 1"]
)
def test_what_decides_about_nothing_stays(line: str) -> None:
    assert line.replace("    ", "        ") in converted(script("function", line))


DDP = HEAD + "from torch.utils.data.distributed import DistributedSampler\nsampler = DistributedSampler(data)\n"


@pytest.mark.parametrize("place", ["function", "generator", "unpacked", "walrus"])
def test_a_script_for_ddp(place: str) -> None:
    text = script(place, "if len(x) < 2:\n    LEAVE", DDP).replace("batch_size=8", "batch_size=8, sampler=sampler")
    assert "if bmt.agree(len(x) < 2):" in converted(text)
    text = script(place, "if (y == 0).sum() == 0:\n    LEAVE", DDP)
    assert not convert_text(text).changed


def test_a_function_that_gets_other_data_too() -> None:
    text = script("function", "if len(x) < 2:\n    LEAVE") + "for x, y in kept:\n    step(net, opt, x, y)\n"
    assert not convert_text(text).changed


def test_a_step_of_another_file(tmp_path: Path) -> None:
    step, _, train = script("function", "if len(x) < 2:\n    LEAVE").partition("\n\n\n" + MAKE)
    (tmp_path / "engine.py").write_text(step)
    (tmp_path / "train.py").write_text(f"{HEAD}from engine import step\n\n{MAKE}{train}")
    results = convert_paths([tmp_path / "engine.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert b"if bmt.total(len(x)) < 2:" in results[0].after


NUMBERED = """net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
train_loader = DataLoader(data, batch_size=8, shuffle=True)
last = -1
{named}for i, (x, y) in {iterated}:
    loss = F.mse_loss(net(x), y)
    loss.backward()
    if i - last >= every:
        opt.step()
        opt.zero_grad()
        last = i
"""
BARS = {
    "in a bar": ("", "tqdm(enumerate(train_loader))"),
    "by a name": ("bar = enumerate(train_loader)\n", "bar"),
    "by a name that a bar gets": ("bar = enumerate(train_loader)\nif show:\n    bar = tqdm(bar)\n", "bar"),
    "by a name of a bar": ("bar = tqdm(enumerate(train_loader), total=9)\n", "bar"),
}


@pytest.mark.parametrize(("named", "iterated"), BARS.values(), ids=BARS.keys())
def test_the_number_of_a_batch_is_no_share_of_it(named: str, iterated: str) -> None:
    source = HEAD + "from tqdm import tqdm\n" + NUMBERED.format(named=named, iterated=iterated)
    assert "optim_manager.step()\n" in converted(source)


def test_a_value_of_a_batch_in_a_named_loop_is_a_share_of_it() -> None:
    source = HEAD + NUMBERED.format(named="bar = enumerate(train_loader)\n", iterated="bar")
    result = convert_text(source.replace("i - last >= every", "x[0, 0] > 0"))
    assert any("this test is of the batch" in f.message for f in result.reported)
