# ruff: noqa: E501 - tables of code are easier to read on one line
"""A mean over padding is reported also where the function that pads is made by another, or the loss is handed on."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, x):
        return self.out(self.emb(x))


"""
COLLATE = """def collate(items):
    x = pad_sequence([t[:-1] for t in items], batch_first=True)
    y = pad_sequence([t[1:] for t in items], batch_first=True)
    return x, y
"""
INNER = "def made(vocab):\n" + "".join(f"    {line}\n" for line in COLLATE.splitlines()) + "\n    return collate\n"
STEP = """    for x, y in loader:
        opt.zero_grad()
        out = net(x)
        loss = criterion(out.view(-1, 9), y.view(-1))
        loss.backward()
        opt.step()
"""
TRAIN = f"def train(net, loader, criterion, opt):\n{STEP}"
BASE = """class Base:
    def loader(self, data, collate_fn=None):
        if collate_fn is None:
            collate_fn = self.get_collate(data)
        return DataLoader(data, batch_size=4, collate_fn=collate_fn)

    def get_collate(self, data):
        return None


class Trainer(Base):
    def get_collate(self, data):
"""
BASE += "".join(f"        {line}\n" for line in COLLATE.splitlines()) + "\n        return collate\n\n"
BASE += "".join(f"    {line}\n" for line in TRAIN.replace("train(net", "train(self, net").splitlines())
LOSS = "nn.CrossEntropyLoss({0})"
END = "net = Net()\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
SCRIPTS = {
    "itself": f"{HEAD}{COLLATE}\n\n{TRAIN}\n\n{END}train(net, DataLoader(data, batch_size=4, collate_fn=collate), {LOSS}, opt)\n",
    "made by a call": f"{HEAD}{INNER}\n\n{TRAIN}\n\n{END}train(net, DataLoader(data, batch_size=4, collate_fn=made(9)), {LOSS}, opt)\n",
    "made and named": f"{HEAD}{INNER}\n\n{TRAIN}\n\n{END}own = made(9)\ntrain(net, DataLoader(data, batch_size=4, collate_fn=own), {LOSS}, opt)\n",
    "a loss that is named": f"{HEAD}{COLLATE}\n\n{TRAIN}\n\n{END}ce = {LOSS}\ntrain(net, DataLoader(data, batch_size=4, collate_fn=collate), ce, opt)\n",
    "a loss handed on twice": f"{HEAD}{COLLATE}\n\n{TRAIN}\n\ndef fit(net, loader, loss_fn, opt):\n    train(net, loader, loss_fn, opt)\n\n\n{END}fit(net, DataLoader(data, batch_size=4, collate_fn=collate), {LOSS}, opt)\n",
    "a method below": f"{HEAD}{BASE}\n\n{END}trainer = Trainer()\ntrainer.train(net, trainer.loader(data), {LOSS}, opt)\n",
}


def told(name: str, options: str) -> bool:
    found = convert_text(SCRIPTS[name].replace("{0}", options)).reported
    return any("this mean is taken over the padding" in said.message for said in found)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_leaves_it_out_is_not(name: str) -> None:
    assert not told(name, "ignore_index=0")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mean_over_padding_is_reported(name: str) -> None:
    assert told(name, "")
