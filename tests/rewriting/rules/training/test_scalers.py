"""A GradScaler with several optimizers, and gradients that are read between unscale_ and the step."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import torch

gen, disc = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
first = torch.optim.SGD(gen.parameters(), lr=0.1)
second = torch.optim.SGD(disc.parameters(), lr=0.1)
scaler = torch.amp.GradScaler()
for x in xs:
"""
LOOPS = {
    "together": (
        "scaler.scale(loss_of(x)).backward()\nscaler.step(first)\nscaler.step(second)\nscaler.update()\nfirst.zero_grad()\nsecond.zero_grad()\n",
        "optim_manager.backward(loss_of(x))\noptim_manager.step()\nfirst.zero_grad()\nsecond.zero_grad()\n",
    ),
    "in turns": (
        "scaler.scale(one(x)).backward()\nscaler.step(first)\nsecond.zero_grad()\nscaler.scale(two(x)).backward()\nscaler.step(second)\nscaler.update()\n",
        "optim_manager.backward(one(x))\noptim_manager.step(first)\nsecond.zero_grad()\noptim_manager.backward(two(x))\noptim_manager.step(second)\n",
    ),
    "one of them at times": (
        "scaler.scale(loss_of(x)).backward()\nscaler.step(first)\nif odd:\n    scaler.step(second)\nscaler.update()\n",
        "optim_manager.backward(loss_of(x))\noptim_manager.step(first)\nif odd:\n    optim_manager.step(second)\n",
    ),
    "one is clipped by value": (
        "scaler.scale(loss_of(x)).backward()\nscaler.unscale_(second)\nclip(disc)\nscaler.step(first)\nscaler.step(second)\nscaler.update()\n",
        "optim_manager.backward(loss_of(x))\noptim_manager.unscale(second)\nclip(disc)\noptim_manager.step()\n",
    ),
}


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


@pytest.mark.parametrize(("before", "after"), LOOPS.values(), ids=LOOPS.keys())
def test_each_optimizer_steps_once(before: str, after: str) -> None:
    assert indented(after) in converted(HEAD + indented(before))


ONE = """import torch

net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
scaler = torch.amp.GradScaler()
for x in xs:
    scaler.scale(net(x).mean()).backward()
"""
READ = {
    "clipped by value": "torch.nn.utils.clip_grad_value_(net.parameters(), 0.1)",
    "changed": "for p in net.parameters():\n    p.grad.add_(0.1)",
    "printed": "print(net.weight.grad.norm().item())",
    "by a function": "norm = norm_of(net.parameters())",
    "then clipped": "noise(net)\ntorch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)",
}
NOT_READ = {
    "nothing": "pass",
    "clipped by norm": "norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)\nprint(norm.item())",
    "clipped at times": "if clip > 0:\n    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)",
}


@pytest.mark.parametrize("text", READ.values(), ids=READ.keys())
@pytest.mark.parametrize("at_times", [False, True])
def test_gradients_are_unscaled_for_what_reads_them(text: str, at_times: bool) -> None:
    body = f"scaler.unscale_(opt)\n{text}\n"
    body = f"if clip:\n{indented(body)}" if at_times else body
    after = converted(f"{ONE}{indented(body)}    scaler.step(opt)\n    scaler.update()\n")
    assert after.index("backward(") < after.index("optim_manager.unscale()\n") < after.index("optim_manager.step()\n")


@pytest.mark.parametrize("text", NOT_READ.values(), ids=NOT_READ.keys())
def test_the_manager_unscales_for_itself(text: str) -> None:
    after = converted(f"{ONE}    scaler.unscale_(opt)\n{indented(text)}    scaler.step(opt)\n    scaler.update()\n")
    assert "unscale" not in after and "optim_manager.step()\n" in after


def test_clipping_of_scaled_gradients_is_said() -> None:
    clip = "    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)\n"
    step = "    scaler.step(opt)\n    scaler.update()\n"
    said = [
        any("with the loss scale on them" in finding.message for finding in convert_text(text).reported)
        for text in (f"{ONE}{clip}{step}", f"{ONE}    scaler.unscale_(opt)\n{clip}{step}")
    ]
    assert said == [True, False]


def test_a_scaler_of_several_is_handed_on() -> None:
    body = "    scaler.scale(loss_of(opt)).backward()\n    scaler.step(opt)\n    scaler.update()\n"
    text = HEAD.replace("for x in xs:\n", "") + "step(first, scaler)\nstep(second, scaler)\n"
    after = converted(text.replace("import torch\n\n", f"import torch\n\n\ndef step(opt, scaler):\n{body}\n\n"))
    assert "    scaler.backward(loss_of(opt))\n    scaler.step(opt)\n" in after
    assert "scaler.add_optimizer(first)\n" in after and "scaler.add_optimizer(second)\n" in after
