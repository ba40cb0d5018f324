"""Gradients that a script averages over the ranks itself, as they are or packed together, are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.cli import main
from rewriter.convert import convert_text

SCRIPT = """import torch
import torch.distributed as dist

dist.init_process_group("gloo")
net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4):
    opt.zero_grad()
    loss = net(x).mean()
    loss.backward()
    {lines}
    opt.step()
"""
LINES = {
    "each": "for p in net.parameters():\n        dist.all_reduce(p.grad.data)",
    "by name": "for p in net.parameters():\n        g = p.grad\n        dist.all_reduce(g)",
    "a flat one": "flat = torch.cat([p.grad.view(-1) for p in net.parameters()])\n    dist.all_reduce(flat)",
    "of a list": (
        "grads = [p.grad.data for p in net.parameters()]\n    flat = torch._utils._flatten_dense_tensors(grads)\n"
        "    dist.all_reduce(flat)"
    ),
    "appended": (
        "grads = []\n    for p in net.parameters():\n        grads.append(p.grad)\n    flat = torch.cat(grads)\n"
        "    dist.all_reduce(flat, op=dist.ReduceOp.SUM)"
    ),
    "coalesced": "dist.all_reduce_coalesced([p.grad for p in net.parameters()])",
    "to one": "for p in net.parameters():\n        dist.reduce(p.grad, 0)",
}
NUMBERS = {
    "a norm": "n = torch.stack([p.grad.norm() for p in net.parameters()]).norm()\n    dist.all_reduce(n)",
    "a test": "bad = torch.isnan(net.weight.grad).any().float()\n    dist.all_reduce(bad)",
    "a loss": "seen = loss.detach()\n    dist.all_reduce(seen)",
}
HOOKED = """import torch
import torch.distributed as dist


def reduced(net):
    def later():
        grads = [p.grad.data for p in net.parameters()]
        flat = torch.cat([g.view(-1) for g in grads])
        dist.all_reduce(flat)

    for p in net.parameters():
        p.register_hook(lambda *given: torch.autograd.Variable._execution_engine.queue_callback(later))
    return net
"""


def told(lines: str) -> bool:
    found = convert_text(SCRIPT.format(lines=lines)).reported
    return any("averaged by hand" in said.message for said in found)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_made_of_them_are_not(name: str) -> None:
    assert not told(NUMBERS[name])


@pytest.mark.parametrize("name", LINES)
def test_gradients_are(name: str) -> None:
    assert told(LINES[name])


def test_in_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hooks.py").write_text(HOOKED)
    text = SCRIPT.format(lines="pass").replace("\nopt =", "\nnet = reduced(net)\nopt =")
    (tmp_path / "train.py").write_text(f"from hooks import reduced\n{text}")
    main([str(tmp_path), "--write"])
    said = capsys.readouterr().out
    assert "averaged by hand" in said and "hooks.py:9" in said.splitlines()[-1]


@pytest.mark.parametrize(("option", "said"), [('default=""', True), ('default="a"', False), ("required=True", False)])
def test_a_number_that_an_option_undoes_decides(option: str, said: bool) -> None:
    text = SCRIPT.format(lines="pass").replace(
        'dist.init_process_group("gloo")',
        f'import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument("--group", {option})\n'
        "args = parser.parse_args()\ncount = torch.cuda.device_count()\nif count > 1:\n"
        '    if args.group == "":\n        count = 1\nif count > 1:\n    dist.init_process_group("gloo")',
    )
    found = convert_text(text).reported
    assert any("decides whether ranks share the work" in item.message for item in found) == said
