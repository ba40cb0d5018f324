"""Code that looks for ``module.`` before the names in checkpoints, where no wrapper puts it any more."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import IMPORTS, NET

SCRIPT = """net = Net()
net = {wrapper}
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in xs:
    net(x).mean().backward()
    opt.step()
    opt.zero_grad()
torch.save(net.state_dict(), "net.pt")
state = torch.load("old.pt")
for k in list(state):
    {reads}
"""
DDP = "nn.parallel.DistributedDataParallel(net)"
TOLD = {
    "begins with it": 'keep = k.startswith("module.encoder")',
    "is cut": 'state[k[len("module.encoder."):]] = state.pop(k)',
    "is replaced": 'state[k.replace("module.backbone.", "")] = state.pop(k)',
    "is read": 'bias = state["module.a.bias"]',
    "is in it": 'if "module.a" in k:\n        del state[k]',
}
NOT_TOLD = {
    "any": 'state[k.replace("module.", "")] = state.pop(k)',
    "cut": 'state[k[len("module."):] if k.startswith("module.") else k] = state.pop(k)',
    "words": 'print("module. The next one")',
}


def told(reads: str, wrapper: str) -> int:
    result = convert_text(IMPORTS + NET + SCRIPT.format(wrapper=wrapper, reads=reads))
    assert not result.error
    return sum('"module." before' in said.message for said in result.reported)


@pytest.mark.parametrize("reads", TOLD.values(), ids=TOLD.keys())
@pytest.mark.parametrize("wrapper", [DDP, "nn.DataParallel(net)"])
def test_names_that_are_no_more_are_told(reads: str, wrapper: str) -> None:
    assert told(reads, wrapper) == 1


@pytest.mark.parametrize("reads", NOT_TOLD.values(), ids=NOT_TOLD.keys())
def test_what_takes_it_off_goes_on(reads: str) -> None:
    assert told(reads, DDP) == 0


def test_where_nothing_was_wrapped_it_is_the_models() -> None:
    assert told(TOLD["begins with it"], "net") == 0
