"""An optimizer that steps in the forward of a module is reported: on several ranks that fails."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch import nn


class Learner({base}):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def {method}(self, x):
        loss = self.net(x).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


learner = Learner()
for x in batches:
    print(learner{call}(x))
"""


def told(base: str, method: str) -> bool:
    call = "" if method == "forward" else f".{method}"
    found = convert_text(SCRIPT.format(base=base, method=method, call=call)).reported
    return any("steps in Learner.forward" in said.message for said in found)


def test_in_a_forward() -> None:
    assert told("nn.Module", "forward")


@pytest.mark.parametrize(("base", "method"), [("nn.Module", "train_on"), ("object", "forward")])
def test_elsewhere(base: str, method: str) -> None:
    assert not told(base, method)
