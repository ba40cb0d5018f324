"""Places in a batch are others in a rank's share, and a function of a mean is no row: neither is collected as rows."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import IMPORTS, NET, converted

SCRIPT = (
    "import numpy as np\n"
    + IMPORTS
    + NET
    + """
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
kept = []
for x, y in DataLoader(data, batch_size=8):
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    {body}
"""
)
TOLD = {
    "where": "kept.extend(torch.where(y == 0)[0].tolist())",
    "shown": "print(torch.where(y == 0)[0].tolist())",
    "numpy's": "kept.extend(np.argwhere(y.numpy())[:, 0])",
    "named": "idx = (y == 0).nonzero().squeeze(1)\n    kept.extend(idx.tolist())",
    "a logarithm of a mean": "kept.append(torch.log(x.mean()).item())",
    "an exponential of one": "kept.append(x.mean().exp().item())",
}


@pytest.mark.parametrize("body", TOLD.values(), ids=TOLD.keys())
def test_what_has_no_rows_is_reported(body: str) -> None:
    text = SCRIPT.format(body=body)
    assert "gather_samples" not in converted(text)
    assert len([item for item in convert_text(text).reported if item.code == "BMT037"]) == 1


COLLECTED = {
    "chosen": "kept.extend(torch.where(y == 0, x, y).tolist())",
    "masked": "kept.extend(x[y == 0].tolist())",
    "of each": "kept.extend(torch.log(x).tolist())",
}


@pytest.mark.parametrize("body", COLLECTED.values(), ids=COLLECTED.keys())
def test_rows_are_collected(body: str) -> None:
    assert "bmt.gather_samples(" in converted(SCRIPT.format(body=body))


def test_a_mean_of_a_function_of_each_is_a_mean() -> None:
    assert "bmt.sum_loss(x.exp().mean().item())" in converted(SCRIPT.format(body="kept.append(x.exp().mean().item())"))
