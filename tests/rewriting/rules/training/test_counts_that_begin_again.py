"""Counts, lists and sums that a loop shows and sets back now and then hold what all ranks have."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import IMPORTS, NET, converted

SCRIPT = (
    IMPORTS
    + NET
    + """
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
hits, seen, kept = 0, 0, []
for i, (x, y) in enumerate(DataLoader(data, batch_size=8)):
    out = net(x)
    loss = F.cross_entropy(out, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    {body}
"""
)
HITS = "hits += (out.argmax(1) == y).sum().item()\n    seen += y.size(0)\n"
HITS += "    if i % 10 == 0:\n        print(hits / seen)\n"
BOTH = ["hits += bmt.total((out.argmax(1) == y).sum().item())", "seen += bmt.total(y.size(0))"]
AGAIN = {
    "together": (HITS + "        hits, seen = 0, 0", BOTH),
    "one by one": (HITS + "        hits = 0\n        seen = 0", BOTH),
    "in a row": (HITS + "        hits = seen = 0", BOTH),
    "in each pass": ("seen += len(x)\n    print(seen)\n    seen = 0", ["seen += bmt.total(len(x))"]),
    "a list": (
        "kept.append(len(x))\n    if i % 10 == 0:\n        print(kept)\n        kept = []",
        ["bmt.total(len(x))"],
    ),
}


@pytest.mark.parametrize(("body", "expected"), AGAIN.values(), ids=AGAIN.keys())
def test_what_begins_again(body: str, expected: list[str]) -> None:
    text = SCRIPT.format(body=body)
    after = converted(text)
    assert all(line in after for line in expected), after
    assert not [item for item in convert_text(text).reported if item.code == "BMT037"]


def test_what_begins_with_a_share_is_reported() -> None:
    text = SCRIPT.format(body="seen += len(x)\n    if i % 10 == 0:\n        print(seen)\n        seen = len(x)")
    assert "bmt.total" not in converted(text)
    assert [item for item in convert_text(text).reported if item.code == "BMT037"]


def test_what_each_pass_makes_anew_is_made_whole_where_it_is_shown() -> None:
    body = "hits = 0\n    for c in range(3):\n        hits += (y == c).sum().item()\n    print(hits)"
    assert "bmt.print_rank(bmt.total(hits))" in converted(SCRIPT.format(body=body))
