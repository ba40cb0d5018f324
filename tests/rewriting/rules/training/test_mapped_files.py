"""A file that every rank maps to memory to write is reported."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import numpy as np
import torch

held = {mapped}
net = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
net(torch.ones(2, 2)).sum().backward()
optimizer.step()
"""
WRITTEN = {
    "anew": "np.memmap('a.bin', dtype='float32', mode='w+', shape=(2, 2))",
    "in place": "np.memmap('a.bin', 'float32', 'r+')",
    "by default": "np.memmap('a.bin', dtype='float32')",
    "as an array": "np.lib.format.open_memmap('a.npy', mode='w+', shape=(2, 2))",
}
READ = {
    "read": "np.memmap('a.bin', dtype='float32', mode='r')",
    "a copy": "np.memmap('a.bin', 'float32', 'c')",
}


def told(mapped: str) -> bool:
    return any(
        "every rank writes this file" in said.message for said in convert_text(SCRIPT.format(mapped=mapped)).reported
    )


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_not(name: str) -> None:
    assert not told(READ[name])


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is(name: str) -> None:
    assert told(WRITTEN[name])
