"""A model of the project that has a ``save_pretrained`` of its own: what it writes is converted where it writes."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import json
import os
import torch
from torch import nn
from torch.utils.data import DataLoader
{imports}


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width
        self.inner = nn.Linear(4, width)

    def forward(self, x):
        return self.inner(x)

    def save_pretrained(self, path):
        os.makedirs(path, exist_ok=True)
        torch.save(self.state_dict(), os.path.join(path, "pytorch_model.bin"))
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump(self.width, f)

    @classmethod
    def from_pretrained(cls, path):
        return cls(json.load(open(os.path.join(path, "config.json"))))


net = {made}
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in DataLoader(data, batch_size=4):
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
net.save_pretrained("out")
"""
OWN = ["Net(8)", "Net.from_pretrained(path)", "Net.from_pretrained(path) if path else Net(8)", "Net(8).to(device)"]


@pytest.mark.parametrize("made", OWN)
def test_nothing_is_said_of_the_call(made: str) -> None:
    result = convert_text(SCRIPT.format(imports="", made=made))
    after = result.after.decode()
    assert 'bmt.save_checkpoint(self.state_dict(), os.path.join(path, "pytorch_model.bin"))' in after
    assert not any("every rank must call" in said.message for said in result.reported)
