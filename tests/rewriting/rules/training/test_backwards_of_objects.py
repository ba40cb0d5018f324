"""``trainer.backward(loss)``: an object that is no loss runs the backward."""

from __future__ import annotations

import pytest

from ...helpers import IMPORTS, NET, converted

TRAINER = """class Steps:
    def __init__(self, net, lr=0.1):
        self.net = net
        self.opt = torch.optim.SGD(net.parameters(), lr=lr)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.opt.step()
        self.opt.zero_grad()


"""
USES = {
    "a name": "steps = Steps(net)\nfor x in xs:\n    loss = net(x).mean()\n    {}\n    steps.step()\n",
    "of what it computes": "steps = Steps(net)\nfor x in xs:\n    {}\n    steps.step()\n",
}
CALLS = {"a name": "steps.backward(loss)", "of what it computes": "steps.backward(net(x).mean())"}


@pytest.mark.parametrize("kind", USES)
def test_its_own_backward_stays(kind: str) -> None:
    text = IMPORTS + NET + TRAINER + "net = Net()\n" + USES[kind].format(CALLS[kind])
    assert f"    {CALLS[kind]}\n" in converted(text)


def test_that_of_an_attribute_stays() -> None:
    text = """class Loop:
    def __init__(self, net):
        self.net, self.steps = net, None
        self.steps = Steps(net)

    def run(self, xs):
        for x in xs:
            self.steps.backward(self.net(x).mean())
            self.steps.step()


Loop(Net()).run(xs)
"""
    assert "self.steps.backward(self.net(x).mean())" in converted(IMPORTS + NET + TRAINER + text)


def test_that_of_an_argument_stays() -> None:
    text = """def run(net, steps, xs):
    for x in xs:
        loss = net(x).mean()
        steps.backward(loss)
        steps.step()


net = Net()
run(net, Steps(net), xs)
"""
    after = converted(IMPORTS + NET + TRAINER + text)
    assert "        steps.backward(loss)\n" in after


def test_a_loss_that_is_given_gradients_is_scaled() -> None:
    text = """net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in xs:
    out = net(x)
    out.backward(torch.ones_like(out))
    opt.step()
"""
    assert "optim_manager.scale_loss(out).backward(torch.ones_like(out))" in converted(IMPORTS + NET + text)
