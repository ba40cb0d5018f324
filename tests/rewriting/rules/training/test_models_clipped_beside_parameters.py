"""A model is clipped by its own norm, where its optimizer has parameters beside it that no module holds."""

from __future__ import annotations

import pytest

from ...helpers import IMPORTS, NET, converted

SCRIPT = """net = Net()
{free}
opt = torch.optim.AdamW([{{"params": net.parameters()}}, {{"params": [free]}}], lr=0.1)
for x in xs:
    (net(x) @ free).mean().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
"""
FREE = {
    "a parameter": "free = nn.Parameter(torch.randn(3, 2))",
    "by its module's name": "free = torch.nn.parameter.Parameter(torch.randn(3, 2)).to('cpu')",
    "a tensor that trains": "free = torch.randn(3, 2, requires_grad=True)",
    "made to train": "free = torch.randn(3, 2).requires_grad_()",
}
HELD = {
    "none": "free = torch.randn(3, 2)",
    "in a module": "class Free(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.p = nn.Parameter(torch.randn(3, 2))\n\n\nfree = torch.randn(3, 2)",
    "that does not": "free = torch.randn(3, 2, requires_grad=False)",
}


@pytest.mark.parametrize("free", FREE.values(), ids=FREE.keys())
def test_it_is_clipped_by_its_own_norm(free: str) -> None:
    after = converted(IMPORTS + NET + SCRIPT.format(free=free))
    assert 'clip_grad_norm([{"params": list(net.parameters())}], 1.0)' in after


@pytest.mark.parametrize("free", HELD.values(), ids=HELD.keys())
def test_where_all_are_the_models_the_optimizers_are_clipped(free: str) -> None:
    after = converted(IMPORTS + NET + SCRIPT.format(free=free))
    assert "clip_grad_norm(opt.param_groups, 1.0)" in after
