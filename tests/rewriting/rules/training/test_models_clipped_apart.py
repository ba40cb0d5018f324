"""``clip_grad_norm_`` of one model, where the optimizer has the parameters of others, too."""

from __future__ import annotations

import pytest

from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

SCRIPT = f"""import itertools
{IMPORTS}

{NET}

torch.manual_seed(3)
net, head = Net(), nn.Linear(3, 2)
{{made}}
for x, y in DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 2)), batch_size=4):
    opt.zero_grad()
    F.mse_loss(head(net(x)), y).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.05)
{{clip}}    opt.step()
"""
SGD = "opt = torch.optim.SGD({}, lr=0.5)"
BOTH = "    nn.utils.clip_grad_norm_(head.parameters(), 0.1)\n"
GROUPS = '[{"params": net.parameters()}, {"params": head.parameters()}]'
ADDED = "list(net.parameters()) + list(head.parameters())"
MADE = {
    "groups": (SGD.format(GROUPS), BOTH),
    "one of them": (SGD.format(GROUPS), ""),
    "a sum": (SGD.format(ADDED), BOTH),
    "a chain": (SGD.format("itertools.chain(net.parameters(), head.parameters())"), BOTH),
    "unpacked": (SGD.format("[*net.parameters(), *head.parameters()]"), BOTH),
    "a name": (f"params = {ADDED}\n" + SGD.format("params"), BOTH),
    "groups by a name": (f"groups = {GROUPS}\n" + SGD.format("groups"), BOTH),
    "a list of models": (SGD.format("[p for m in (net, head) for p in m.parameters()]"), BOTH),
    "extended": ("params = list(net.parameters())\nparams += list(head.parameters())\n" + SGD.format("params"), BOTH),
    "a group added": (
        SGD.format("net.parameters()") + '\nopt.add_param_group({"params": head.parameters()})',
        BOTH,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_each_is_clipped_to_its_own_norm(name: str) -> None:
    made, clip = MADE[name]
    text = SCRIPT.format(made=made, clip=clip)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    after = converted(text)
    assert run_ranks(1, weights_after, after, initialize=False, fresh=True) == pytest.approx([one], rel=1e-6)


@pytest.mark.parametrize(
    "made", ["net.parameters()", "filter(lambda p: p.requires_grad, net.parameters())", "groups_of(net)"]
)
def test_the_only_model_is_clipped_by_the_groups_of_its_optimizer(made: str) -> None:
    text = f"{IMPORTS}\n\n{NET}\n\nnet = Net()\nopt = torch.optim.SGD({made}, lr=0.5)\n"
    text += "for x in xs:\n    net(x).mean().backward()\n    nn.utils.clip_grad_norm_(net.parameters(), 1.0)\n"
    assert "clip_grad_norm(opt.param_groups, 1.0)" in converted(text + "    opt.step()\n    opt.zero_grad()\n")


@pytest.mark.parametrize("made", ["wrapped = Wrapped(net)", "wrapped = net", "wrapped, rest = prepare(net, loader)"])
def test_a_model_that_holds_the_other_is_clipped_by_the_groups_of_its_optimizer(made: str) -> None:
    text = f"{IMPORTS}\n\n{NET}\n\nnet = Net()\n{made}\nopt = torch.optim.SGD(net.parameters(), lr=0.5)\n"
    text += "for x in xs:\n    wrapped(x).mean().backward()\n    nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)\n"
    assert "clip_grad_norm(opt.param_groups, 1.0)" in converted(text + "    opt.step()\n    opt.zero_grad()\n")
