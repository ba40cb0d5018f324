"""Functions that a decorator lets one rank alone into, which hold what is for all ranks."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """import functools
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
{imports}

{decorator}

{function}

dist.init_process_group("gloo")
net = DDP(torch.nn.Linear(4, 4))
opt = torch.optim.AdamW(net.parameters())
for step in range(4):
    net(torch.ones(2, 4)).mean().backward()
    opt.step()
    opt.zero_grad()
    save(net.module, step)
"""
WRAPPER = """def only(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        {body}

    return wrapper
"""
GUARDED = "if dist.get_rank() == 0:\n            return function(*args, **kwargs)"
NAMED = "rank, _ = dist.get_rank(), 1\n        if rank == 0:\n            return function(*args, **kwargs)"
LEFT = "if dist.get_rank() != 0:\n            return None\n        return function(*args, **kwargs)"
SAVE = """@only
def save(model, step):
    os.remove("old.pt")
    torch.save(model.state_dict(), f"{step}.pt")
"""
AFTER = """def save(model, step):
    if bmt.rank() == 0:
        os.remove("old.pt")
    bmt.save(model, f"{step}.pt")
"""


@pytest.mark.parametrize("body", [GUARDED, NAMED, LEFT], ids=["a guard", "a name", "an exit"])
def test_every_rank_enters(body: str) -> None:
    after = converted(SCRIPT.format(imports="", decorator=WRAPPER.format(body=body), function=SAVE))
    assert AFTER in after and "@only" not in after


@pytest.mark.parametrize("name", ["rank_zero_only", "master_only", "main_process_only"])
def test_one_of_a_package_is_known_by_its_name(name: str) -> None:
    function = SAVE.replace("only", name)
    after = converted(SCRIPT.format(imports=f"from package import {name}", decorator="", function=function))
    assert AFTER in after and f"@{name}" not in after


def test_others_stay() -> None:
    decorator = WRAPPER.format(body=GUARDED)
    function = "@torch.no_grad()\n# for one\n@only  # and no other\n@functools.cache\n" + SAVE.removeprefix("@only\n")
    after = converted(SCRIPT.format(imports="", decorator=decorator, function=function))
    assert f"@torch.no_grad()\n# for one\n# and no other\n@functools.cache\n{AFTER}" in after


def test_a_decorator_with_arguments_goes() -> None:
    decorator = "def only(rank=0):\n    def inner(function):\n" + "\n".join(
        f"        {line}" if line else "" for line in WRAPPER.format(body=GUARDED).splitlines()[1:]
    )
    function = SAVE.replace("@only", "@only(rank=0)")
    assert AFTER in converted(
        SCRIPT.format(imports="", decorator=decorator + "\n    return inner\n", function=function)
    )


def test_a_method_loses_it_too() -> None:
    function = "class Saver:\n    " + SAVE.replace("\n", "\n    ").replace(
        "save(model, step)", "save(self, model, step)"
    )
    script = SCRIPT.format(imports="", decorator=WRAPPER.format(body=GUARDED), function=function)
    after = converted(script.replace("    save(net", "    Saver().save(net"))
    assert "@only" not in after and "        bmt.save(model, " in after


def test_what_only_writes_stays_with_one_rank() -> None:
    function = '@only\ndef save(model, step):\n    os.makedirs(f"out{step}")\n'
    assert "@only\ndef save" in converted(
        SCRIPT.format(imports="", decorator=WRAPPER.format(body=GUARDED), function=function)
    )


def test_a_decorator_that_asks_for_no_rank_stays() -> None:
    body = "return function(*args, **kwargs)"
    after = converted(SCRIPT.format(imports="", decorator=WRAPPER.format(body=body), function=SAVE))
    assert "@only\ndef save" in after
