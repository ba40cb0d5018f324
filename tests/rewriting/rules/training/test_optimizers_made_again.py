# ruff: noqa: E501 - tables of code are easier to read on one line
"""An optimizer that is made anew gets a manager each time; one that is chosen among several gets one."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = "import torch\n\nnet = torch.nn.Linear(4, 1)\n"
MAKE = "opt = torch.optim.SGD(net.parameters(), lr=0.1)"
STEP = "opt.zero_grad()\nnet(x).mean().backward()\nopt.step()\n"


def indent(text: str, by: int = 1) -> str:
    return "".join("    " * by + line + "\n" for line in text.splitlines())


AGAIN = {
    "in a loop": f"{MAKE}\nfor phase in range(2):\n    if phase == 1:\n        {MAKE}\n{indent(STEP)}",
    "after a trial": f"{MAKE}\n{STEP}{MAKE}\nfor x in xs:\n{indent(STEP)}",
    "with its model": f"net, opt = build()\nfor n in range(2):\n    if n:\n        net, opt = build()\n{indent(STEP)}",
    "under a while": f"{MAKE}\nwhile True:\n{indent(STEP)}    if bad:\n        {MAKE}\n",
    "in a function": f"def train():\n    {MAKE}\n{indent(STEP)}    {MAKE}\n{indent(STEP)}\n\ntrain()\n",
}
AGAIN["by a function"] = (
    f"def train():\n{indent(STEP)}\n\nopt = None\ntry:\n    {MAKE}\n    for epoch in range(3):\n        train()\n"
    f"        if epoch:\n            {MAKE}\nexcept KeyboardInterrupt:\n    pass\n"
)


@pytest.mark.parametrize("text", AGAIN.values(), ids=AGAIN.keys())
def test_each_gets_a_manager(text: str) -> None:
    after = converted(HEAD + text)
    lines = [line.strip() for line in after.splitlines()]
    made = [number for number, line in enumerate(lines) if line.startswith(("opt = torch", "net, opt = "))]
    assert len(made) == 2
    for number in made:
        assert lines[number + 1 : number + 3] == [
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)",
            "optim_manager.add_optimizer(opt)",
        ]


ONCE = {
    "chosen": f"if fast:\n    {MAKE}\nelse:\n    opt = torch.optim.AdamW(net.parameters())\n{STEP}",
    "in each turn": f"for fold in range(3):\n    {MAKE}\n{indent(STEP)}",
    "none at first": f"opt = None\n{MAKE}\n{STEP}",
    "replaced before use": f"{MAKE}\nopt = wrap(opt)\n{STEP}",
}


@pytest.mark.parametrize("text", ONCE.values(), ids=ONCE.keys())
def test_one_is_enough(text: str) -> None:
    assert converted(HEAD + text).count("OptimManager(") == 1


@pytest.mark.parametrize("clears", ["opt.zero_grad()", "net.zero_grad()"])
def test_a_scaler_that_stays_is_refused(clears: str) -> None:
    step = f"scaler.scale(net(x).mean()).backward()\nscaler.step(opt)\nscaler.update()\n{clears}\n"
    text = (
        f"{HEAD}{MAKE}\nscaler = torch.amp.GradScaler()\nfor n in range(2):\n    if n:\n        {MAKE}\n{indent(step)}"
    )
    result = convert_text(text)
    assert not result.changed and any("made again" in finding.message for finding in result.reported)


def test_a_scaler_that_stays_is_refused_wherever_the_optimizer_is_made() -> None:
    step = "scaler.scale(net(x).mean()).backward()\nscaler.step(opt)\nscaler.update()\nnet.zero_grad()\n"
    text = f"{HEAD}{MAKE}\nscaler = torch.amp.GradScaler()\nfor n in range(2):\n{indent(step)}    if not n:\n{indent(MAKE, 2)}"
    result = convert_text(text)
    assert not result.changed and any("made again" in finding.message for finding in result.reported)


def test_a_function_that_gives_the_module_another() -> None:
    load = "def load():\n    global net, opt\n    net, opt = torch.load('both.pt', weights_only=False)\n\n\n"
    train = f"def train():\n{indent(STEP)}\n\ntry:\n    if plain:\n        {MAKE}\n    for epoch in range(3):\n        train()\n"
    after = converted(f"{HEAD}{load}{train}        if epoch:\n            {MAKE}\nfinally:\n    load()\n")
    assert after.count("OptimManager(") == 3
    assert "weights_only=False)\n    global optim_manager\n    optim_manager = bmt." in after
    assert after.index("    if plain:") < after.index("        optim_manager = ") < after.index("    for epoch")
