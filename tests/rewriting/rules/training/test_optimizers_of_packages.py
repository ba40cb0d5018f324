"""An object of another package makes an optimizer for the model and steps it in its own code: it gets its manager."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

PACKAGE = '''import sys
import types

CODE = """
import torch

class Algo:
    def __init__(self, net, lr=0.1):
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr)

    def update(self, x, y):
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.1)
        self.optimizer.step()
        return {"loss": loss.item()}
"""
sys.modules["others"] = types.ModuleType("others")
exec(CODE, vars(sys.modules["others"]))
'''
SCRIPT = """{package}
{imports}
import others

{net}

torch.manual_seed(0)
net = Net()
{made}
{reads}
x, y = torch.randn(12, 4), torch.randint(3, (12,))
for _ in range(3):
    algo.update(x, y)
"""
SAVES = 'state = {"optimizer": algo.optimizer.state_dict()}'
ADDED = "bmt.optim.OptimManager(loss_scale=None).add_optimizer(algo.optimizer)"
MADE = {
    "plainly": "algo = others.Algo(net)",
    "by name": "algo = others.Algo(lr=0.05, net=net)",
    "in a branch": "if True:\n    algo = others.Algo(net)\nelse:\n    algo = others.Algo(net, 0.2)",
}
NOT_MADE = {
    "not of a model": ("algo = others.Algo(12)", SAVES),
    "not read": ("algo = others.Algo(net)", ""),
    "of the project": (
        "class Algo:\n    def __init__(self, net):\n        self.optimizer = None\nalgo = Algo(net)",
        SAVES,
    ),
}


def script(made: str, reads: str = SAVES) -> str:
    return SCRIPT.format(package=PACKAGE, imports=IMPORTS, net=NET, made=made, reads=reads)


@pytest.mark.parametrize(("made", "reads"), NOT_MADE.values(), ids=NOT_MADE.keys())
def test_nothing_is_added(made: str, reads: str) -> None:
    assert "add_optimizer" not in convert_text(script(made, reads)).after.decode()


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_it_gets_its_manager(made: str) -> None:
    after = converted(script(made))
    assert after.count(ADDED) == made.count("others.Algo(")


@pytest.mark.parametrize("reads", [SAVES, "algo.optimizer.load_state_dict(algo.optimizer.state_dict())"])
def test_weights_are_those_of_the_script(reads: str) -> None:
    text = script(MADE["plainly"], reads)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    after = converted(text)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-5)
