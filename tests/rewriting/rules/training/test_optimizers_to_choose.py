"""An optimizer whose steps take a closure, and is one of several to choose from, does not stop the others."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch


def make(net, name):
    {made}


net = torch.nn.Linear(4, 1)
opt = make(net, "sgd")
for x in data:
    opt.zero_grad()
    net(x).mean().backward()
    opt.step()
"""
SGD, LBFGS = "torch.optim.SGD(net.parameters(), 0.1)", "torch.optim.LBFGS(net.parameters())"
CHOSEN = {
    "a test": f"if name == 'sgd':\n        return {SGD}\n    elif name == 'lbfgs':\n        return {LBFGS}",
    "a test in front": f"if name == 'lbfgs':\n        return {LBFGS}\n    return {SGD}",
    "an expression": f"return {LBFGS} if name == 'lbfgs' else {SGD}",
    "a match": f"match name:\n        case 'lbfgs':\n            return {LBFGS}\n        case _:\n"
    f"            return {SGD}",
    "a table": f"return {{'sgd': {SGD}, 'lbfgs': {LBFGS}}}[name]",
    "a table of functions": f"return {{'sgd': lambda: {SGD}, 'lbfgs': lambda: {LBFGS}}}[name]()",
    "a name": f"opt = {SGD}\n    if name == 'lbfgs':\n        opt = {LBFGS}\n    return opt",
}


@pytest.mark.parametrize("made", CHOSEN.values(), ids=CHOSEN.keys())
def test_one_of_several_is_driven(made: str) -> None:
    result = convert_text(SCRIPT.format(made=made))
    assert not result.error and b"OptimManager" in result.after
    assert not any("LBFGS" in finding.message for finding in result.reported)


def test_one_that_looks_into_layers_stops_the_conversion() -> None:
    result = convert_text(SCRIPT.format(made="return Sophia(net.parameters())"))
    assert b"OptimManager" not in result.after and any("runs the model" in f.message for f in result.reported)
