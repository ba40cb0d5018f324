"""Sets of words, which every process has in another order, are sorted where something is made in their order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

SCRIPT = """import torch

words = open(__file__).read().split()
texts = [line.strip() for line in open(__file__)]
rows = torch.randint(9, (12,))
{code}
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for x in torch.randn(3, 8, 4):
    loss = model(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
LEFT = {
    "sorted": "order = sorted(set(words))",
    "a sorted list": "order = sorted(list(set(words)))",
    "counted": "count = len(set(words))",
    "a list that is counted": "count = len(list(set(words)))",
    "asked": "known = 'a' in set(words)",
    "no set": "order = list(words)",
    "a dict": "order = list(dict.fromkeys(words))",
    "numbers": "order = list(set(rows.tolist()))",
    "of a range": "order = list(set(range(9)) - {3})",
    "lengths of words": "order = list({len(w) for w in words})",
    "written numbers": "order = list({1, 2, 3})",
    "another set": "order = set(list(set(words)))",
    "a loop that adds up": "n = 0\nfor word in set(words):\n    n += len(word)",
}
SORTED = {
    "a list": ("order = list(set(words))", "list(sorted(set(words)))"),
    "numbered": ("order = {w: i for i, w in enumerate(set(words))}", "enumerate(sorted(set(words)))"),
    "characters": ("order = list(set(''.join(words)))", "list(sorted(set(''.join(words))))"),
    "by a name": ("vocab = set(words)\norder = {w: i for i, w in enumerate(vocab)}", "enumerate(sorted(vocab))"),
    "made in it": ("order = list({w.lower() for w in words})", "list(sorted({w.lower() for w in words}))"),
    "in a list": ("order = [w for w in set(words)]", "[w for w in sorted(set(words))]"),
    "in a loop": (
        "order = {}\nfor w in set(words):\n    order[w] = len(order)",
        "for w in sorted(set(words)):",
    ),
    "joined": ("order = list(set(words) | {'unk'})", "list(sorted(set(words) | {'unk'}))"),
    "of characters of texts": ("order = tuple(set(c for t in texts for c in t))", "tuple(sorted(set(c for"),
    "written": ("order = list({'a', 'b'})", "list(sorted({'a', 'b'}))"),
}
TOLD = {
    "of what is not seen": "order = list(set(data.things))",
    "of a key": "order = list(set(row['kind'] for row in rows))",
    "by a name": "found = set(data.things)\norder = list(enumerate(found))",
}


def told(code: str) -> list[str]:
    result = convert_text(SCRIPT.format(code=code))
    assert not result.error and b"OptimManager" in result.after
    return [said.message for said in result.reported if said.code == "BMT047"]


@pytest.mark.parametrize("code", LEFT.values(), ids=LEFT.keys())
def test_what_has_no_order_or_one_is_left(code: str) -> None:
    assert code in converted(SCRIPT.format(code=code)) and told(code) == []


@pytest.mark.parametrize(("code", "expected"), SORTED.values(), ids=SORTED.keys())
def test_words_are_sorted(code: str, expected: str) -> None:
    after = converted(SCRIPT.format(code=code))
    assert expected in after and told(code) == []
    assert converted(after) == after


@pytest.mark.parametrize("code", TOLD.values(), ids=TOLD.keys())
def test_what_may_be_words_is_told(code: str) -> None:
    assert len(told(code)) == 1


def test_processes_agree() -> None:
    script = "words = 'to be or not to be'.split()\n# here\nprint(order)"
    after = converted(SCRIPT.format(code="order = list(set(words))"))
    line = next(line for line in after.splitlines() if line.startswith("order"))
    code = script.replace("# here", line)
    environment = [{**os.environ, "PYTHONHASHSEED": str(seed)} for seed in range(4)]
    assert len({subprocess.check_output([sys.executable, "-c", code], env=env) for env in environment}) == 1


ASKED = {
    "in a comprehension": "order = list(set(data.things) & set(data.others))\nfound = [x for x in xs if x in order]",
    "not in": "order = tuple(set(data.things))\nfound = [x for x in xs if x not in order]\nn = len(order)",
    "sorted later": "order = list(set(data.things))\nfor x in sorted(order):\n    print(x)",
}
GONE_THROUGH = {
    "also gone through": "order = list(set(data.things))\nif x in order:\n    f(x)\nfor x in order:\n    f(x)",
    "handed on": "order = list(set(data.things))\nfound = [x for x in xs if x in order]\nf(order)",
}


@pytest.mark.parametrize("code", ASKED.values(), ids=ASKED.keys())
def test_a_list_that_is_only_asked_has_no_order(code: str) -> None:
    inside = "def keep():\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "\nkeep()"
    assert told(inside) == []


@pytest.mark.parametrize("code", GONE_THROUGH.values(), ids=GONE_THROUGH.keys())
def test_a_list_that_is_gone_through_has_one(code: str) -> None:
    inside = "def keep():\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "\nkeep()"
    assert len(told(inside)) == 1
