"""An optimizer that a function is given, or None, with something else that says which."""

from __future__ import annotations

import pytest

from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

PROGRAM = f"""{IMPORTS}

{NET}

torch.manual_seed(3)
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.5)
data = TensorDataset(torch.randn(16, 4), torch.randn(16, 3))


def train(net, opt, extra, extra_opt, flag=0):
    for x, y in DataLoader(data, batch_size=4):
        net.zero_grad()
        {{clear}}loss = F.mse_loss(net(x), y)
        {{test}}
            loss = loss + extra(x).mean()
        loss.backward()
        {{test}}
            extra_opt.step()
        opt.step()


train(net, opt, None, None)
"""
CLEAR = "if extra is not None:\n            extra_opt.zero_grad()\n        "
TESTS = {
    "is not None": ("if extra is not None:", ""),
    "cleared, too": ("if extra is not None:", CLEAR),
    "by its truth": ("if extra:", ""),
    "and more": ("if extra is not None and flag == 0:", ""),
    "not None is": ("if not extra is None:", ""),
}


@pytest.mark.parametrize("name", TESTS)
def test_one_that_is_none_is_not_driven(name: str) -> None:
    test, clear = TESTS[name]
    text = PROGRAM.format(test=test, clear=clear)
    after = converted(text)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)


def test_one_that_is_none_where_nothing_is_trained() -> None:
    text = (
        PROGRAM[: PROGRAM.index("def train")]
        + """def run(net, opt, train):
    for x, y in DataLoader(data, batch_size=4):
        loss = F.mse_loss(net(x), y)
        if train:
            opt.zero_grad()
            loss.backward()
            opt.step()


run(net, opt, True)
run(net, None, False)
"""
    )
    after = converted(text)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)


def test_one_that_is_stepped_at_times_is_there() -> None:
    text = f"{IMPORTS}\n\ndef train(net, opt, xs, every):\n    for i, x in enumerate(xs):\n"
    text += "        net(x).mean().backward()\n        if i % every == 0:\n            opt.step()\n"
    assert "if opt is not None" not in converted(text)
