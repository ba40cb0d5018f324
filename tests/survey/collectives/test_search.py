# ruff: noqa: E501 - tables of code are easier to read on one line
"""The search finds what it is made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from .__main__ import search

HEAD = "import os, time, random\nimport bmtrain as bmt\n\n\ndef keep(net):\n    bmt.save(net, 'x')\n\n\ndef train(net, path):\n"
FOUND = {
    "a file": "if not os.path.exists(path):\n    bmt.save(net, path)",
    "through a function": "if time.time() > 5:\n    keep(net)",
    "by a name": "late = time.time() > 5\nif late:\n    keep(net)",
    "a break": "for x in xs:\n    if random.random() < 0.5:\n        break\n    optim_manager.step()",
    "a continue": "for x in xs:\n    if random.random() < 0.5:\n        continue\n    optim_manager.step()",
    "a return": "if os.environ.get('X'):\n    return\nkeep(net)",
    "a while": "while time.time() < 5:\n    keep(net)",
    "a conditional expression": "y = keep(net) if os.path.isfile(path) else 0",
    "a short circuit": "os.path.isfile(path) or keep(net)",
    "inside agree's neighbour": "if bmt.agree(step > 5) and os.path.isfile(path):\n    keep(net)",
}
RIGHT = {
    "agreed": "if not bmt.agree(os.path.exists(path)):\n    bmt.save(net, path)",
    "the same": "if step % 5 == 0:\n    keep(net)",
    "nothing for all": "if os.path.exists(path):\n    count = 1",
    "a mean": "if bmt.sum_loss(loss) < best:\n    keep(net)",
    "a continue behind": "for x in xs:\n    optim_manager.step()\n    if random.random() < 0.5:\n        continue\n    print(x)",
}


def places(text: str) -> list[str]:
    body = "".join(f"    {line}\n" for line in text.splitlines())
    return list(search({Path("a.py"): (HEAD + body).encode()}))


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND.keys())
def test_found(text: str) -> None:
    assert len(places(text)) == 1


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT.keys())
def test_right(text: str) -> None:
    assert places(text) == []
