"""A loss that a function trained on and gives back is its caller's loss, too."""

from __future__ import annotations

import pytest

from ...helpers import converted

HEAD = """import torch
import torch.nn.functional as F

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
scaler = torch.amp.GradScaler("cpu")
"""
TRAINED = "    loss.backward()\n    opt.step()\n"
STEP = "def work(x, y):\n    loss = F.mse_loss(net(x), y)\n"
GIVEN = {
    "early return": (
        "def work(x, y):\n    if not len(x):\n        return None\n"
        f"    loss = F.mse_loss(net(x), y)\n{TRAINED}    return loss\n",
        "loss = work(x, y)",
    ),
    "bare return": (
        "def work(x, y):\n    if not len(x):\n        return\n"
        f"    loss = F.mse_loss(net(x), y)\n{TRAINED}    return loss\n",
        "loss = work(x, y)",
    ),
    "scaled": (
        f"{STEP}    scaler.scale(loss).backward()\n    scaler.step(opt)\n    scaler.update()\n    return loss\n",
        "loss = work(x, y)",
    ),
    "divided": (f"{STEP}    (loss / 2).backward()\n    opt.step()\n    return loss\n", "loss = work(x, y)"),
    "pair": (f"{STEP}{TRAINED}    return loss, len(x)\n", "loss, seen = work(x, y)"),
    "last of a tuple": (f"{STEP}{TRAINED}    return x, len(x), loss\n", "_, seen, loss = work(x, y)"),
}
STEPS = "def work():\n    for i, (x, y) in enumerate(loader):\n        loss = F.mse_loss(net(x), y)\n"
TRAINED_INSIDE = "        loss.backward()\n        opt.step()\n"


@pytest.mark.parametrize("name", GIVEN)
def test_a_step_gives_its_loss(name: str) -> None:
    function, call = GIVEN[name]
    after = converted(f"{HEAD}{function}for x, y in loader:\n    {call}\n    print(loss.item())\n")
    assert "bmt.print_rank(bmt.sum_loss(loss).item())" in after


@pytest.mark.parametrize(
    ("given", "head"),
    [
        ("loss", "for loss in work():"),
        ("i, loss", "for i, loss in work():"),
        ("loss, x, y", "for loss, _, _ in work():"),
    ],
)
def test_a_generator_gives_its_losses(given: str, head: str) -> None:
    after = converted(f"{HEAD}{STEPS}{TRAINED_INSIDE}        yield {given}\n{head}\n    print(loss.item())\n")
    assert "bmt.print_rank(bmt.sum_loss(loss).item())" in after


STAYS = {
    "another place": (f"{STEP}{TRAINED}    return len(x), loss\n", "seen, loss = work(x, y)\n    print(seen.item())"),
    "a number": (f"{STEP}{TRAINED}    return loss.item()\n", "value = work(x, y)\n    print(float(value))"),
    "not trained on": (f"{STEP}{TRAINED}    return x, loss\n", "seen, loss = work(x, y)\n    print(seen.sum())"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_no_loss_stays(name: str) -> None:
    function, call = STAYS[name]
    shown = call.rpartition("print(")[2][:-1]
    after = converted(f"{HEAD}{function}for x, y in loader:\n    {call}\n")
    assert f"bmt.print_rank({shown})" in after


MEAN = """import torch
from torch import nn

model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
ema = torch.optim.swa_utils.AveragedModel(model)
opt = torch.optim.Adam(model.parameters())


def fit(model, ema, opt):
    for x in loader:
        model(x).mean().backward()
        opt.step()
    torch.save({"model": model.module.state_dict(), "ema": ema.module.state_dict()}, "a.pt")


"""


@pytest.mark.parametrize("call", ["fit(model, ema, opt)", "fit(model, opt=opt, ema=ema)"])
def test_an_average_that_is_handed_on_keeps_its_module(call: str) -> None:
    after = converted(f"{MEAN}{call}\n")
    assert '"model": model.state_dict()' in after
    assert '"ema": ema.module.state_dict()' in after
