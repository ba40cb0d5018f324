"""What the runtime would not do as torch does is reported on its line."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = "import torch\n\nnet = torch.nn.Linear(4, 1)\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
STEP = "net(x).mean().backward()\nopt.step()\n"


def reported(text: str) -> list[int]:
    found = convert_text(HEAD + text + STEP).reported
    words = ("is a copy", "clip_grad_value_", "autograd.grad", "keep their size")
    return [f.line - HEAD.count("\n") for f in found if any(word in f.message for word in words)]


WRITTEN = {
    "copied": "own = net.state_dict()\nown['weight'].copy_(value)\n",
    "filled": "own = net.state_dict()\nown['weight'].data.fill_(0)\n",
    "sliced": "own = net.state_dict()\nown['weight'][:2] = value\n",
    "in a function": (
        "def take(model, saved):\n    own = model.state_dict()\n    for k in saved:\n        own[k].copy_(saved[k])\n"
    ),
    "gradients of parameters": "grads = torch.autograd.grad(net(x).mean(), net.parameters())\n",
    "of a list of them": "ps = list(net.parameters())\ngrads = torch.autograd.grad(net(x).mean(), ps)\n",
    "of a weight": "grads = torch.autograd.grad(outputs=net(x).mean(), inputs=net.weight)\n",
    "resized": "net.resize_token_embeddings(len(tokenizer))\n",
    "clipped": "x = 1\ntorch.nn.utils.clip_grad_value_(net.parameters(), 0.1)\n",
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN.keys())
def test_reported(text: str) -> None:
    assert reported(text) == [text.count("\n")]


RIGHT = {
    "loaded": "own = net.state_dict()\nown['weight'].copy_(value)\nnet.load_state_dict(own)\n",
    "replaced": "own = net.state_dict()\nown['weight'] = value\n",
    "read": "own = net.state_dict()\nprint(own['weight'].sum())\n",
    "gradients of an input": "grads = torch.autograd.grad(net(x).mean(), x, create_graph=True)\n",
    "another dict": "own = dict(a=x)\nown['a'].copy_(value)\n",
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT.keys())
def test_not_reported(text: str) -> None:
    assert reported(text) == []
