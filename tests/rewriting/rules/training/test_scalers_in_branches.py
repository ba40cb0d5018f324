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


GIVEN = {
    name: MADE[name].replace(OPT, "") for name in ("under if", "under elif", "deeper", "where it can be", "in a block")
}
GIVEN |= {
    "at once": "scaler = torch.amp.GradScaler(enabled=amp)\n",
    "or none": "scaler = torch.amp.GradScaler() if amp else None\n",
    "after none": IN_ANY_CASE["after none"].replace(OPT, ""),
}
"""The optimizer is the function's argument."""


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


@pytest.mark.parametrize("made", GIVEN.values(), ids=GIVEN.keys())
def test_a_manager_that_a_function_makes_is_told_the_optimizer_that_it_is_given(made: str) -> None:
    after = converted(in_function(made).replace("def train(net,", "def train(net, opt,"))
    assert after.count("optim_manager.add_optimizer(opt)") == 1 + ("scaler = None" in made)


def test_one_of_two_functions_makes_a_scaler() -> None:
    steps = ("opt.zero_grad()", "net(x).mean().backward()", "opt.step()\n")
    plain = "def train(net, opt, xs):\n    for x in xs:\n        " + "\n        ".join(steps)
    scaled = plain.replace("train(", "train_amp(").replace("    for", "    scaler = torch.amp.GradScaler()\n    for")
    scaled = scaled.replace("net(x).mean().backward()", "scaler.scale(net(x).mean()).backward()")
    scaled = scaled.replace("opt.step()", "scaler.step(opt)\n        scaler.update()")
    calls = f"net = torch.nn.Linear(4, 1)\n{OPT}if amp:\n    train_amp(net, opt, xs)\nelse:\n    train(net, opt, xs)\n"
    after = converted(f"import torch\n\n\n{scaled}\n\n{plain}\n\n{calls}")
    assert after.count("    optim_manager.add_optimizer(opt)\n    for x in xs:") == 2
