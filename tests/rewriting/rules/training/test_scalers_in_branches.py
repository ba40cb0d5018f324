"""A GradScaler that is made only under a test, while what steps without it stands behind it."""

from __future__ import annotations

import ast

import pytest

from ...helpers import converted

STEPS = """for x in xs:
    opt.zero_grad()
    loss = net(x).mean()
    if amp:
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    else:
        loss.backward()
        opt.step()
"""
OPT = "opt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
MADE = {
    "under if": f"{OPT}if amp:\n    scaler = torch.cuda.amp.GradScaler()\n",
    "under else": f"{OPT}if not amp:\n    pass\nelse:\n    scaler = torch.amp.GradScaler()\n",
    "before the optimizer": f"if amp:\n    scaler = torch.cuda.amp.GradScaler()\n{OPT}",
    "with an optimizer": "if amp:\n    opt = torch.optim.Adam(net.parameters())\n    scaler = torch.amp.GradScaler()\n"
    f"else:\n    {OPT}",
    "under elif": f"{OPT}if kind:\n    print(kind)\nelif amp:\n    scaler = torch.cuda.amp.GradScaler()\n",
    "of two": f"{OPT}if amp:\n    scaler = torch.cuda.amp.GradScaler()\nelif kind:\n    print(kind)\n",
    "deeper": f"{OPT}if gpu:\n    if amp:\n        scaler = torch.cuda.amp.GradScaler()\n",
    "where it can be": f"{OPT}try:\n    scaler = torch.amp.GradScaler()\nexcept AttributeError:\n    amp = False\n",
    "in a block": f"{OPT}if amp:\n    with warned():\n        scaler = torch.cuda.amp.GradScaler()\n",
}
IN_ANY_CASE = {
    "or leaves": f"{OPT}if amp:\n    scaler = torch.cuda.amp.GradScaler()\nelse:\n    raise ValueError(amp)\n",
    "or none": f"{OPT}if amp:\n    scaler = torch.cuda.amp.GradScaler()\nelse:\n    scaler = None\n",
    "after none": f"{OPT}scaler = None\nif amp:\n    scaler = torch.cuda.amp.GradScaler()\n",
    "of two kinds": f"{OPT}if amp:\n    scaler = torch.amp.GradScaler()\n"
    "else:\n    scaler = torch.amp.GradScaler(enabled=False)\n",
    "in a block": f"{OPT}with warned():\n    scaler = torch.cuda.amp.GradScaler()\n",
}


def in_function(made: str) -> str:
    body = "".join(f"    {line}\n" for line in (made + STEPS).splitlines())
    return f"import torch\n\n\ndef train(net, xs, amp, kind, gpu, warned):\n{body}"


class Manager:
    def __init__(self, loss_scale: float | None) -> None:
        self.loss_scale, self.optimizers, self.steps = loss_scale, 0, 0

    def add_optimizer(self, optimizer: object) -> None:
        self.optimizers += 1

    def backward(self, loss: object) -> None: ...

    def zero_grad(self) -> None: ...

    def step(self) -> None:
        assert self.optimizers == 1
        self.steps += 1


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("amp", [False, True])
def test_there_is_a_manager_whichever_way_the_script_goes(made: str, amp: bool) -> None:
    """What the script's statements make is run, with stand-ins for the rest."""
    after = converted(in_function(made))
    function = ast.parse(after).body[-1]
    assert isinstance(function, ast.FunctionDef)
    seen: list[Manager] = []

    class Everything:
        def __getattr__(self, name: str) -> Everything:
            return self

        def __call__(self, *given: object, **named: object) -> Everything:
            return self

        def __enter__(self) -> None: ...

        def __exit__(self, *given: object) -> None: ...

        def OptimManager(self, loss_scale: float | None) -> Manager:
            seen.append(Manager(loss_scale))
            return seen[-1]

    names = {"torch": Everything(), "bmt": Everything()}
    exec(compile(ast.Module([function], []), "train", "exec"), names)
    everything = Everything()
    names["train"](everything, [1, 2], amp, False, True, everything)
    assert seen[-1].steps == 2
    expected = None if not amp and "try" not in made else 2**16
    assert seen[-1].loss_scale == expected


@pytest.mark.parametrize("made", IN_ANY_CASE.values(), ids=IN_ANY_CASE.keys())
def test_a_scaler_that_is_made_in_any_case_needs_no_other(made: str) -> None:
    assert converted(in_function(made)).count("OptimManager(") == made.count("scaler =")


def test_training_that_stands_under_the_test_needs_no_other() -> None:
    inner = "".join(f"    {line}\n" for line in STEPS.replace("if amp", "if True").splitlines())
    text = f"import torch\n\n{OPT}if amp:\n    scaler = torch.amp.GradScaler()\n{inner}"
    assert converted(text).count("OptimManager(") == 1


def test_an_attribute_that_only_some_objects_have() -> None:
    text = """import torch


class Trainer:
    def __init__(self, net, amp):
        self.net, self.amp = net, amp
        self.opt = torch.optim.SGD(net.parameters(), lr=0.1)
        if self.amp:
            self.scaler = torch.cuda.amp.GradScaler()

    def step(self, x):
        loss = self.net(x).mean()
        if self.amp:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.opt)
            self.scaler.update()
        else:
            loss.backward()
            self.opt.step()
"""
    assert """        self.optim_manager = bmt.optim.OptimManager(loss_scale=None)
        if self.amp:
            self.optim_manager = bmt.optim.OptimManager(loss_scale=2**16)
        self.optim_manager.add_optimizer(self.opt)
""" in converted(text)
