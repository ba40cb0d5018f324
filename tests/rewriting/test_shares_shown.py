"""Sizes of a share that are kept, and losses that a callback shows, are reported."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
train_loader = DataLoader(data, batch_size=8, shuffle=True)
history = []
"""
STEP = "    loss = F.mse_loss(net(x), y)\n    loss.backward()\n    opt.step()\n    opt.zero_grad()\n"
FOR = f"for i, (x, y) in enumerate(train_loader):\n{STEP}"
NEXT = f"""it = iter(train_loader)
while True:
    batch = next(it, None)
    if batch is None:
        break
    x, y = batch
{STEP}"""
DDP = "from torch.utils.data.distributed import DistributedSampler\nsampler = DistributedSampler(data)\n"


def told(text: str, words: str) -> int:
    return sum(words in finding.message for finding in convert_text(text).reported)


@pytest.mark.parametrize("size", ["len(x)", "x.size(0)", "x.shape[0]", "len(y)"])
def test_a_size_that_is_kept(size: str) -> None:
    line = f'    history.append({{"loss": 0.0, "seen": {size}}})\n'
    for loop in (FOR, NEXT):
        assert f"bmt.total({size})".encode() in convert_text(f"{HEAD}{loop}{line}").after


def test_a_size_that_is_kept_by_a_script_for_ddp() -> None:
    assert told(f'{HEAD}{DDP}{FOR}    history.append({{"seen": len(x)}})\n', "size of this rank's share") == 1


@pytest.mark.parametrize(
    "line",
    ["history.append(len(train_loader))", "history.append(i)", "seen = {'seen': len(x)}", "total.update(1, len(x))"],
)
def test_other_lengths(line: str) -> None:
    assert told(f"{HEAD}{FOR}    {line}\n", "size of this rank's share") == 0


CALLBACK = """class Log:
    def on_step(self, i, loss):
        print(i, {shown})


"""


@pytest.mark.parametrize("shown", ["loss.item()", "float(loss)"])
def test_a_callback_shows_the_loss(shown: str) -> None:
    text = (
        CALLBACK.format(shown=shown)
        + HEAD
        + f"{FOR}    for callback in callbacks:\n        callback.on_step(i, loss)\n"
    )
    assert told(text, "bmt.sum_loss(loss)") == 1


def test_a_callback_that_gets_no_loss_or_shows_none() -> None:
    text = (
        CALLBACK.format(shown="loss.item()")
        + HEAD
        + f"{FOR}    for callback in callbacks:\n        callback.on_step(loss, i)\n"
    )
    assert told(text, "bmt.sum_loss(loss)") == 0
    text = (
        CALLBACK.format(shown="1") + HEAD + f"{FOR}    for callback in callbacks:\n        callback.on_step(i, loss)\n"
    )
    assert told(text, "bmt.sum_loss(loss)") == 0


def test_who_imports_what_ddp_needs_and_no_more_is_not_parallel() -> None:
    text = f"import logging\n{DDP.splitlines()[0]}\n{HEAD}logging.basicConfig(level=logging.INFO)\n{FOR}"
    assert b"logging.INFO if bmt.rank() == 0 else logging.WARNING" in convert_text(text).after
