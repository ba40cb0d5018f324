"""An optimizer that cannot be driven, and is one of several to choose from, does not stop the others."""

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
ALONE = {
    "alone": f"return {LBFGS}",
    "under a test": f"if name == 'lbfgs':\n        return {LBFGS}",
    "beside another that goes": f"opt = {SGD}\n    opt = {LBFGS}\n    return opt",
    "of another package": f"return Sophia(net.parameters()) if name == 's' else {SGD}",
}


@pytest.mark.parametrize("made", CHOSEN.values(), ids=CHOSEN.keys())
def test_one_of_several_is_reported(made: str) -> None:
    result = convert_text(SCRIPT.format(made=made))
    assert not result.error and b"OptimManager" in result.after
    assert any("where it is chosen, training stops: LBFGS" in finding.message for finding in result.reported)


@pytest.mark.parametrize("made", ALONE.values(), ids=ALONE.keys())
def test_one_that_is_always_made_stops_the_conversion(made: str) -> None:
    result = convert_text(SCRIPT.format(made=made))
    assert b"OptimManager" not in result.after and any("runs the model" in f.message for f in result.reported)
