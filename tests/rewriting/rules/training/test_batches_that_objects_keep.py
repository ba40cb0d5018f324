"""Numbers that are made of a batch which an object has kept: of a rank's share."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.types import Remark

from ...helpers import IMPORTS, NET

SCRIPT = (
    IMPORTS
    + NET
    + """
class Learner:
    def __init__(self):
        self.net = Net()
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def set_input(self, x, y):
        self.x, self.y = x.to(device), y
        self.lr = 0.1

    def step(self):
        self.out = self.net(self.x)
        self.loss = F.cross_entropy(self.out, self.y)
        self.opt.zero_grad()
        self.loss.backward()
        self.opt.step()

    def told(self):
        return {told}


learner = Learner()
for x, y in DataLoader(data, batch_size=8):
    learner.set_input(x, y)
    learner.step()
{behind}
"""
)


def reported(told: str, behind: str) -> list[str]:
    found = convert_text(SCRIPT.format(told=told, behind=behind)).reported
    return [item.message for item in found if isinstance(item, Remark) and "object keeps" in item.message]


LEFT = {
    "a loss": ("self.loss.item()", "print(learner.told())"),
    "a number": ("float(self.lr)", ""),
    "a kind": ("self.x.device", "print(learner.x.dtype)"),
    "rows": ("self.out", ""),
    "the first row": ("self.out[0].sum().item()", ""),
    "another object's": ("other.out.sum().item()", ""),
}


@pytest.mark.parametrize(("told", "behind"), LEFT.values(), ids=LEFT.keys())
def test_other_numbers_are_not_reported(told: str, behind: str) -> None:
    assert reported(told, behind) == []


NUMBERS = {
    "hits": ("(self.out.argmax(1) == self.y).float().mean().item()", ""),
    "of what comes in": ("float(self.x.mean())", ""),
    "a list": ("self.out.argmax(1).tolist()", ""),
    "an array": ("self.out.detach().numpy()", ""),
    "outside": ("0", "print(learner.out.std().item())"),
}


@pytest.mark.parametrize(("told", "behind"), NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_the_share_are_reported(told: str, behind: str) -> None:
    assert len(reported(told, behind)) == 1


def test_what_the_loop_itself_keeps() -> None:
    text = (
        IMPORTS
        + NET
        + """
class Trainer:
    def fit(self, net, opt):
        for x, y in DataLoader(data, batch_size=8):
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            self.last = x

net = Net()
trainer = Trainer()
trainer.fit(net, torch.optim.SGD(net.parameters(), lr=0.1))
print(trainer.last.sum().item())
"""
    )
    (told,) = (item for item in convert_text(text).reported if "object keeps" in getattr(item, "message", ""))
    assert "trainer.last.sum().item()" in getattr(told, "message", "")
