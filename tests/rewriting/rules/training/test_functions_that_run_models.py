"""Functions of the project that run the model that they are given: all ranks must, also under a rank's test."""

from __future__ import annotations

import pytest

from ...helpers import IMPORTS, NET, converted

SCRIPT = """def summary(module, inputs, depth=2):
    {body}
    print(type(module).__name__, depth)


rank = int(os.environ["RANK"])
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
if rank == 0:
    {call}
for x in xs:
    net(x).mean().backward()
    opt.step()
"""
RUNS = {
    "by its place": ("outputs = module(*inputs)", "summary(net, [torch.ones(2, 4)])"),
    "by its name": ("outputs = module(inputs)", "summary(inputs=torch.ones(2, 4), module=net)"),
    "under a test": ("outputs = module(inputs) if depth else None", "summary(net, torch.ones(2, 4))"),
}
LEAVES = {
    "asks its class": ("outputs = type(module)", "summary(net, None)"),
    "runs another": ("outputs = inputs(1)", "summary(net, str)"),
}


@pytest.mark.parametrize(("body", "call"), RUNS.values(), ids=RUNS.keys())
def test_all_ranks_run_it(body: str, call: str) -> None:
    after = converted("import os\n" + IMPORTS + NET + SCRIPT.format(body=body, call=call))
    assert f"\n{call}\n" in after


@pytest.mark.parametrize(("body", "call"), LEAVES.values(), ids=LEAVES.keys())
def test_what_runs_nothing_is_left_to_one(body: str, call: str) -> None:
    after = converted("import os\n" + IMPORTS + NET + SCRIPT.format(body=body, call=call))
    assert f"\n    {call}\n" in after
