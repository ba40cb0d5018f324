"""A script that captures its model as a CUDA graph stays as it is, with what to do first; other captures are let be."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch

net = torch.nn.Linear(4, 1).cuda()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
g = torch.cuda.CUDAGraph()
"""
STEP = "for x in loader:\n    net(x).mean().backward()\n    opt.step()\n"
CAPTURED = {
    "a step": "with torch.cuda.graph(g):\n    loss = net(x).mean()\n    loss.backward()\n    opt.step()\n",
    "a forward": "with torch.cuda.graph(g):\n    y = net(x)\n",
    "a backward": "loss = net(x).mean()\nwith torch.cuda.graph(g, pool=pool):\n    loss.backward()\n",
    "in a function": "def capture(g, x):\n    with torch.cuda.graph(g):\n        return net(x)\n\n\ncapture(g, x)\n",
    "by another name": "from torch.cuda import graph\n\nwith graph(g):\n    y = net(x)\n",
    "callables": "net = torch.cuda.make_graphed_callables(net, (x,))\n",
    "several callables": "net, other = torch.cuda.make_graphed_callables((net, other), ((x,), (y,)))\n",
}
OTHER = {
    "no model": "with torch.cuda.graph(g):\n    z = x @ y\n",
    "not of torch": "with viz.graph(g):\n    y = net(x)\n",
    "a callable of tensors": "norm = torch.cuda.make_graphed_callables(torch.norm, (x,))\n",
}


def told(text: str) -> list[str]:
    result = convert_text(HEAD + text + STEP)
    assert not result.error
    return [finding.message for finding in result.reported if "CUDA graph" in finding.message]


@pytest.mark.parametrize("name", OTHER)
def test_what_captures_no_model(name: str) -> None:
    assert not told(OTHER[name])
    assert convert_text(HEAD + OTHER[name] + STEP).changed


@pytest.mark.parametrize("name", CAPTURED)
def test_the_script_stays(name: str) -> None:
    assert len(told(CAPTURED[name])) == 1
    assert not convert_text(HEAD + CAPTURED[name] + STEP).changed


@pytest.mark.parametrize("name", ["a step", "a forward", "callables"])
def test_on_request(name: str) -> None:
    text = "if args.graphs:\n    " + CAPTURED[name].replace("\n", "\n    ").rstrip() + "\n"
    assert "where it is asked for" in told(text)[0]
    assert convert_text(HEAD + text + STEP).changed
