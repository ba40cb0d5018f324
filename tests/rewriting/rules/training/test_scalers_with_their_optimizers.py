"""A GradScaler and its optimizer made in the same branch, while a function above it steps both."""

from __future__ import annotations

import pytest

from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

TRAIN = """def train():
    for x, y in DataLoader(data, batch_size=4):
        opt.zero_grad()
        scaler.scale(F.mse_loss(net(x), y)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()


"""
DATA = "data = TensorDataset(torch.randn(16, 4), torch.randn(16, 3))\n"
NET_MADE = "torch.manual_seed(3)\nnet = Net()\n"
OPT = "opt = torch.optim.SGD(net.parameters(), lr=0.5)\n"
SCALER = 'scaler = torch.amp.GradScaler("cpu", enabled=False)\n'
HALF = f"if False:\n    {SCALER}else:\n    {SCALER}"
MAIN = 'if __name__ == "__main__":'


def under(head: str, *lines: str) -> str:
    return head + "\n" + "".join(f"    {line}\n" for line in "".join(lines).splitlines())


PROGRAMS = {
    "main": under(MAIN, NET_MADE, DATA, SCALER, OPT, "train()"),
    "main, the optimizer first": under(MAIN, NET_MADE, DATA, OPT, SCALER, "train()"),
    "main, epochs": under(MAIN, NET_MADE, DATA, SCALER, OPT, "for epoch in range(2):\n    train()"),
    "main turned round": under('if "__main__" == __name__:', NET_MADE, DATA, SCALER, OPT, "train()"),
    "main, the optimizer outside": NET_MADE + DATA + OPT + under(MAIN, SCALER, "train()"),
    "main, the scaler in both branches": under(MAIN, NET_MADE, DATA, OPT, HALF, "train()"),
    "a flag": "trains = True\n" + under("if trains:", NET_MADE, DATA, SCALER, OPT, "train()"),
    "a flag in main": under(MAIN, "trains = True\n", under("if trains:", NET_MADE, DATA, SCALER, OPT, "train()")),
    "until it is stopped": under("try:", NET_MADE, DATA, SCALER, OPT, "train()")
    + "except KeyboardInterrupt:\n    print('stopped')\n",
    "until it is stopped, in main": under(MAIN, NET_MADE, DATA, under("try:", SCALER, OPT, "train()"))
    + "    except KeyboardInterrupt:\n        print('stopped')\n",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_optimizer_is_driven_before_the_function_is_called(name: str) -> None:
    text = f"{IMPORTS}\n\n{NET}\n\n{TRAIN}{PROGRAMS[name]}"
    after = converted(text)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)
