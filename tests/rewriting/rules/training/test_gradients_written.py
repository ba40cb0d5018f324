"""Gradients that a loop over parameters writes are the rank's, and are written where they lie."""

from __future__ import annotations

import pytest

from ...helpers import IMPORTS, NET, converted

SCRIPT = """net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in xs:
    net(x).mean().backward()
    for p in net.parameters():
        if p.grad is not None:
            {}
    opt.step()
    opt.zero_grad()
"""
WRITTEN = {
    "out": "torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)",
    "out of its data": "torch.clamp(p.grad, -1, 1, out=p.grad.data)",
    "of another": "torch.mul(p.grad, 0.5, out=p.grad)",
    "in place": "torch.nan_to_num_(p.grad)",
    "clamped in place": "torch.clamp_(p.grad, -1, 1)",
    "its own method": "p.grad.nan_to_num_()",
    "its data's": "p.grad.data.clamp_(-1, 1)",
    "an initialisation": "nn.init.zeros_(p.grad)",
}
READ = {
    "a norm": "norms.append(p.grad.norm().item())",
    "printed": "print(p.grad.abs().max())",
    "put elsewhere": "torch.abs(p.grad, out=kept)",
}


@pytest.mark.parametrize("line", WRITTEN.values(), ids=WRITTEN.keys())
def test_what_is_written_stays(line: str) -> None:
    assert f"            {line}\n" in converted(IMPORTS + NET + SCRIPT.format(line))


@pytest.mark.parametrize("line", READ.values(), ids=READ.keys())
def test_what_is_read_is_whole(line: str) -> None:
    assert "bmt.gather_grad(p)" in converted(IMPORTS + NET + SCRIPT.format(line))
