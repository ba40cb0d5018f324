"""What the runtime would not do as torch does is reported on its line; what it does is not."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = "import torch\n\nnet = torch.nn.Linear(4, 1)\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
STEP = "net(x).mean().backward()\nopt.step()\n"


def reported(text: str) -> list[int]:
    result = convert_text(HEAD + text + STEP)
    assert not result.error
    return [f.line - HEAD.count("\n") for f in result.reported if f.code == "BMT091"]


def test_embeddings_that_are_resized_are_reported() -> None:
    """Nobody else knows the model's parameters before it is wrapped."""
    assert reported("net.resize_token_embeddings(len(tokenizer))\n") == [1], "behind the optimizer"
    assert reported("while x:\n    net(x).backward()\n    net.resize_token_embeddings(9)\n") == [3]


RIGHT = {
    "written state": "own = net.state_dict()\nown['weight'].copy_(value)\n",
    "gradients of parameters": "grads = torch.autograd.grad(net(x).mean(), net.parameters())\n",
    "gradients of an input": "grads = torch.autograd.grad(net(x).mean(), x, create_graph=True)\n",
    "clipped by value": "torch.nn.utils.clip_grad_value_(net.parameters(), 0.1)\n",
    "gradients read": "for p in net.parameters():\n    p.grad.mul_(0.5)\n",
    "whole matrices": "opt = torch.optim.Muon(net.parameters(), lr=0.1)\n",
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT.keys())
def test_not_reported(text: str) -> None:
    assert reported(text) == []
