"""``model.zero_grad()`` of one model, where optimizers step several: it clears that model, and no other."""

from __future__ import annotations

import pytest

from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

HEAD = f"""{IMPORTS}

{NET}

torch.manual_seed(3)
net, head = Net(), nn.Linear(3, 2)
data = TensorDataset(torch.randn(16, 4), torch.randn(16, 2))
"""
MADE = """first = torch.optim.SGD(net.parameters(), lr=0.5)
second = torch.optim.SGD(head.parameters(), lr=0.5)
"""
LOOP = "for x, y in DataLoader(data, batch_size=4):\n"
LOSS = "F.mse_loss(head(net(x)), y)"
STEPS = "    first.step()\n    second.step()\n"
FUNCTION = f"""def train(net, head, first, second):
    {LOOP}        net.zero_grad()
        head.zero_grad()
        {LOSS}.backward()
        first.step()
        second.step()


"""
SCALED = """    scaler.scale({}).backward()
    scaler.step(first)
    scaler.step(second)
    scaler.update()
"""
SCALER = f'{MADE}scaler = torch.amp.GradScaler("cpu", enabled=False)\n'
PROGRAMS = {
    "both": f"{MADE}{LOOP}    net.zero_grad()\n    head.zero_grad()\n    {LOSS}.backward()\n{STEPS}",
    "stepped last first": f"{MADE}{LOOP}    head.zero_grad()\n    net.zero_grad()\n    {LOSS}.backward()\n{STEPS}",
    "stepped last only": f"{MADE}{LOOP}    head.zero_grad()\n    {LOSS}.backward()\n{STEPS}",
    "behind the steps": f"{MADE}{LOOP}    {LOSS}.backward()\n{STEPS}    net.zero_grad()\n    head.zero_grad()\n",
    "to zeros": f"{MADE}{LOOP}    net.zero_grad(set_to_none=False)\n    head.zero_grad(set_to_none=False)\n"
    f"    {LOSS}.backward()\n{STEPS}",
    "in turn": f"{MADE}{LOOP}    head.zero_grad()\n    {LOSS}.backward()\n    second.step()\n"
    f"    net.zero_grad()\n    {LOSS}.backward()\n    first.step()\n",
    "the other's": f"{MADE}{LOOP}    head.zero_grad()\n    {LOSS}.backward()\n    first.step()\n    second.step()\n"
    "    net.zero_grad()\n",
    "one scaler": f"{SCALER}{LOOP}    head.zero_grad()\n" + SCALED.format(LOSS),
    "one scaler, both": f"{SCALER}{LOOP}    net.zero_grad()\n    head.zero_grad()\n" + SCALED.format(LOSS),
    "in a function": f"{FUNCTION}{MADE}train(net, head, first, second)\n",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_model_is_cleared_by_itself(name: str) -> None:
    text = HEAD + PROGRAMS[name]
    after = converted(text)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)


def test_the_only_optimizer_s_model_is_cleared_by_its_manager() -> None:
    text = f"{IMPORTS}\n\n{NET}\n\nnet = Net()\nopt = torch.optim.SGD(net.parameters(), lr=0.5)\n"
    text += "for x in xs:\n    net.zero_grad()\n    net(x).mean().backward()\n    opt.step()\n"
    assert "optim_manager.zero_grad()" in converted(text)
