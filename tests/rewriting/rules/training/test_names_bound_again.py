"""``from torch.utils import data``, and then ``for data in loader``: a name is what it was made before its use."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """{imports}
import torch

net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
{made}
{loop}
    opt.zero_grad()
    (net(x) - y).pow(2).mean().backward()
    opt.step()
{behind}
"""
IMPORT = "from torch.utils import data"
LOADER = "loader = data.DataLoader(sets, batch_size=4)"
ITEM = "for data in loader:\n    x, y = data"
BOUND = {
    "by a loop": (IMPORT, LOADER, ITEM, ""),
    "by a numbered loop": (IMPORT, LOADER, "for i, data in enumerate(loader):\n    x, y = data", ""),
    "by a loop, as a module": ("import torch.utils.data as data", LOADER, ITEM, ""),
    "in a loop": (IMPORT, f"for epoch in range(2):\n    {LOADER}", ITEM, ""),
    "behind": (IMPORT, LOADER, "for x, y in loader:", "data = []"),
    "by a with": (IMPORT, LOADER, "for x, y in loader:", "with open(path) as data:\n    data.read()"),
}  # fmt: skip


@pytest.mark.parametrize(("imports", "made", "loop", "behind"), BOUND.values(), ids=BOUND.keys())
def test_what_comes_behind_does_not_count(imports: str, made: str, loop: str, behind: str) -> None:
    after = converted(SCRIPT.format(imports=imports, made=made, loop=loop, behind=behind))
    assert "shard_loader(data.DataLoader(sets, batch_size=4))" in after


AGAIN = "for epoch in range(2):\n    {made}\n    for data in loader:\n        x, y = data\n"


@pytest.mark.parametrize(
    ("imports", "made"),
    [
        (f"{IMPORT}\ndata = other()", LOADER),
        (IMPORT, AGAIN.format(made=LOADER)),
        (f"{IMPORT}\n\n\ndef load():\n    return data.DataLoader(sets)\n", "loader = load()"),
    ],
    ids=["in front", "in the same loop", "from a function"],
)
def test_what_may_have_come_in_front_does(imports: str, made: str) -> None:
    assert "shard_loader" not in converted(SCRIPT.format(imports=imports, made=made, loop=ITEM, behind=""))
