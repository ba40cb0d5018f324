"""A part of the batch that is made anew of itself: what it is, is asked no more often than is needed."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """import torch

model = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(model.parameters())
loader = torch.utils.data.DataLoader(data, batch_size=8)
total = 0
for x, mask, pad in loader:
    {line}
    losses = crit(model(x), mask)
    added = torch.sum(losses).cpu().item()
    mean = added / len(losses)
    loss = losses.mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    total += added
print(total)
"""
LINES = [
    "mask = mask * pad",
    "mask = mask * pad.unsqueeze(-1)",
    "mask = pad.unsqueeze(-1) * mask",
    "mask = mask & pad",
    "mask = mask - pad + mask",
    "mask = mask / mask.max()",
    "mask, pad = mask * pad, pad * mask",
    "pad = mask * pad; mask = pad * mask",
    "x = x * mask; mask = mask * x",
    "mask *= pad",
]


@pytest.mark.parametrize("line", LINES)
def test_it_is_converted(line: str) -> None:
    after = converted(SCRIPT.format(line=line))
    assert "optim_manager.backward(loss)" in after
