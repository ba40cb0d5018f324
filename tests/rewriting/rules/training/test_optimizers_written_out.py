"""``for o in (opt_a, opt_b): o.step()``: each optimizer has its manager, and the loop goes through these."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

SCRIPT = """{imports}
{net}

torch.manual_seed(0)
net = Net()
opt_a = torch.optim.SGD(net.a.parameters(), lr=0.5)
opt_b = torch.optim.Adam(net.b.parameters(), lr=0.05)
sched_a = torch.optim.lr_scheduler.StepLR(opt_a, 1, 0.5)
sched_b = torch.optim.lr_scheduler.StepLR(opt_b, 1, 0.5)
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
for x, y in DataLoader(data, batch_size=12):
    {clear}
    F.cross_entropy(net(x), y).backward()
    {step}
"""
TRAINER = """{imports}
{net}

class Trainer:
    def __init__(self, net):
        self.net = net
        self.opt_a = torch.optim.SGD(net.a.parameters(), lr=0.5)
        self.opt_b = torch.optim.Adam(net.b.parameters(), lr=0.05)

    def fit(self, loader):
        for x, y in loader:
            for o in (self.opt_a, self.opt_b):
                o.zero_grad(set_to_none=True)
            F.cross_entropy(self.net(x), y).backward()
            for o in (self.opt_a, self.opt_b):
                o.step()

torch.manual_seed(0)
net = Net()
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
Trainer(net).fit(DataLoader(data, batch_size=12))
"""
FUNCTION = """{imports}
{net}

def train(net, opt_a, opt_b, loader):
    for x, y in loader:
        [o.zero_grad() for o in [opt_a, opt_b]]
        F.cross_entropy(net(x), y).backward()
        [o.step() for o in [opt_a, opt_b]]

torch.manual_seed(0)
net = Net()
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
loader = DataLoader(data, batch_size=12)
train(net, torch.optim.SGD(net.a.parameters(), lr=0.5), torch.optim.Adam(net.b.parameters(), lr=0.05), loader)
"""
CLEAR, STEP = "for o in (opt_a, opt_b):\n        o.zero_grad()", "for o in (opt_a, opt_b):\n        o.step()"
EACH_CLEAR, EACH_STEP = "opt_a.zero_grad()\n    opt_b.zero_grad()", "opt_a.step()\n    opt_b.step()"


def script(clear: str = CLEAR, step: str = STEP) -> str:
    return SCRIPT.format(imports=IMPORTS, net=NET, clear=clear, step=step)


CONVERTED = {
    "both": script(),
    "cleared one by one": script(EACH_CLEAR),
    "stepped one by one": script(step=EACH_STEP),
    "a list": script(*(loop.replace("(opt_a, opt_b)", "[opt_a, opt_b]") for loop in (CLEAR, STEP))),
    "without brackets": script(CLEAR.replace("(opt_a, opt_b)", "opt_a, opt_b")),
    "comprehensions": script("[o.zero_grad() for o in (opt_a, opt_b)]", "[o.step() for o in (opt_a, opt_b)]"),
    "gradients to None": script(CLEAR.replace("zero_grad()", "zero_grad(set_to_none=True)")),
    "counted": script(step="for i, o in enumerate((opt_a, opt_b)):\n        if i < 2:\n            o.step()"),
    "with schedules": script(
        step="for o, s in zip((opt_a, opt_b), (sched_a, sched_b)):\n        o.step()\n        s.step()"
    ),
    "by another name": script(step=STEP.replace(" o ", " each ").replace("o.step", "each.step")),
    "one of them": script(step="for o in (opt_a,):\n        o.step()\n    opt_b.step()"),
    "rates are set": script(step=STEP.replace("o.step()", "o.param_groups[0]['lr'] *= 0.5\n        o.step()")),
    "rates of groups": script(
        step=STEP.replace("o.step()", "for g in o.param_groups:\n            g['lr'] *= 0.5\n        o.step()")
    ),
    "rates are read": script(
        step=f"{STEP}\n    for o in (opt_a, opt_b):\n        assert len(o.param_groups) == 1\n"
        "    rates = [o.param_groups[0]['lr'] for o in (opt_a, opt_b)]"
    ),
    "of a trainer": TRAINER.format(imports=IMPORTS, net=NET),
    "of a function": FUNCTION.format(imports=IMPORTS, net=NET),
}  # fmt: skip
REFUSED = {
    "groups are exchanged": script(
        step=STEP.replace("o.step()", "o.step()\n        o.param_groups = o.param_groups[:1]")
    ),
    "states are read": script(step=STEP.replace("o.step()", "o.step()\n        seen = o.state")),
    "rates and more": script(
        step=STEP.replace("o.step()", "o.param_groups[0]['lr'] *= 0.5\n        o.step()\n        kept = o")
    ),
    "kept": script(step=STEP.replace("o.step()", "o.step()\n        kept = o")),
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_more_than_clearing_and_stepping_is_refused(text: str) -> None:
    assert any("needs a name of its own" in said.message for said in convert_text(text).reported)


@pytest.mark.parametrize("text", CONVERTED.values(), ids=CONVERTED.keys())
def test_weights_are_those_of_the_script(text: str) -> None:
    after = converted(text)
    assert "opt_a_manager" in after
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)
