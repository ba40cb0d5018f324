"""A batch that a distribution draws, ``prior.sample((batch_size,))``, is shared out as one of ``torch.randn`` is."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

SCRIPT = """{imports}
{net}

torch.manual_seed(0)
net = Net()
gen = nn.Linear(4, 4)
opt = torch.optim.SGD([*net.parameters(), *gen.parameters()], lr=0.1)
prior = torch.distributions.Normal(torch.zeros(4), torch.ones(4))
batch_size, count = 12, 3
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
for x, y in DataLoader(data, batch_size=batch_size):
    z = {drawn}
    loss = F.cross_entropy(net(x), y) + net(gen(z)).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
SHARED = ["prior.sample((batch_size,))", "prior.rsample([batch_size])", "prior.sample((batch_size,)).clamp(-1, 1)"]
LEFT = [
    "prior.sample((x.size(0),))",
    "prior.sample((count,))",
    "prior.sample(x.shape[:1])",
    "memory.sample(batch_size)",
]


def script(drawn: str) -> str:
    return SCRIPT.format(imports=IMPORTS, net=NET, drawn=drawn)


@pytest.mark.parametrize("drawn", LEFT)
def test_what_is_as_large_as_the_share_is_left(drawn: str) -> None:
    assert f"z = {drawn}\n" in convert_text(script(drawn)).after.decode()


@pytest.mark.parametrize("drawn", SHARED)
def test_weights_are_those_of_the_script(drawn: str) -> None:
    after = converted(script(drawn))
    assert "bmt.shard_batch(prior." in after
    (one,) = run_ranks(1, weights_after, script(drawn), initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)
