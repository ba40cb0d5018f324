# ruff: noqa: E501 - tables of code are easier to read on one line
"""Functions that call themselves and each other, and values that are made of themselves."""

from __future__ import annotations

import ast
import itertools
from textwrap import indent

import pytest

from rewriter.analyze.read.circles import AnyCalled

from .helpers import converted

SCRIPT = """import functools
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
net = torch.nn.Linear(4, 4)
{made}
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for x in torch.utils.data.DataLoader(torch.randn(40, 4), 4):
    y = net(x)
    loss = (y - x).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
{used}
"""

MADE = [
    "f = lambda x, n=3: f(net(x), n - 1) if n else x",
    "f = lambda x: g(x)\ng = lambda x: f(net(x))",
    "table = {'a': lambda x: table['b'](x), 'b': lambda x: table['a'](x)}\nf = table['a']",
    "f = functools.partial(net)\nf = functools.partial(f)",
    "f = net\nf = functools.wraps(f)(lambda *a: f(*a))",
    "class F:\n    def __init__(self):\n        self.f = lambda x: self.f(x)\n    def __call__(self, x):\n        return self.f(x)\nf = F()",
    "f = {'net': net}\nf = {**f, 'epoch': 1}",
    "f = dict(net=net)\nf = dict(f=f, epoch=1)",
    "f = []\nf.append(f)\nf = [f, f]",
    "f = net if torch.rand(1) > 2 else (lambda x: f(x))",
    "compose = lambda *fs: functools.reduce(lambda a, b: lambda x: a(b(x)), fs)\nf = compose(net, net)\nf = compose(f, f)",
    "def f(x):\n    return [f(one) for one in x] if isinstance(x, list) else net(x)",
]


@pytest.mark.parametrize("used", ["print(f(y))", "x = f(x)", "torch.save(f, 'f.pt')", "loss = loss + f(y).mean()"])
@pytest.mark.parametrize("made", MADE)
def test_no_rule_goes_round_in_what_is_made_of_itself(made: str, used: str) -> None:
    after = converted(SCRIPT.format(made=made, used=indent(used, "    ")))
    ast.parse(after)
    assert "optim_manager.step()" in after


@pytest.mark.parametrize("first", ["first", "second"])
def test_functions_that_call_each_other_do_what_either_does(first: str) -> None:
    made = "def first(x, n):\n    return second(x, n - 1) if n else net(x).detach()\n\n\n"
    made += "def second(x, n):\n    return first(x, n) if n else x\n\n"
    shown = [
        f"    if dist.get_rank() == 0:\n        print({f}(x, 3))" for f in sorted(("first", "second"), key=first.__ne__)
    ]
    after = converted(SCRIPT.format(made=made, used="\n".join(shown)))
    assert "    bmt.print_rank(first(x, 3))" in after and "    bmt.print_rank(second(x, 3))" in after


def test_what_any_called_function_does_is_the_same_in_every_order() -> None:
    calls = {"a": "bc", "b": "cd", "c": "a", "d": "be", "e": "e", "f": "gf", "g": "f", "h": "af"}
    nodes = {name: ast.Name(name) for name in calls}
    for does in calls:
        reached = {name for name in calls if does in reach(calls, name)}
        for order in itertools.islice(itertools.permutations(calls), 0, None, 97):
            asked = AnyCalled()

            def ask(name: str, asked: AnyCalled = asked, does: str = does) -> bool:
                return asked(nodes[name], lambda: name == does or any(ask(called) for called in calls[name]))

            assert {name for name in order if ask(name)} == reached


@pytest.mark.timeout(100)
def test_values_that_are_made_of_many_are_asked_once() -> None:
    made = [f"    v{k} = v{k - 1} / (v{k - 1} - v{k - 2} * v{k - 1}) + v{k - 2} * v{k - 1}" for k in range(2, 9)]
    head = "import torch\nfrom torch.utils.data import DataLoader\nnet = torch.nn.Linear(4, 1)\n"
    head += "opt = torch.optim.SGD(net.parameters(), lr=0.1)\nfor v0, v1 in DataLoader(data, batch_size=8):\n"
    steps = ["    net(v0).mean().backward()", "    opt.step()", *made, "    print(v8.max().item(), v8.tolist())", ""]
    assert "optim_manager.step()" in converted(head + "\n".join(steps))  # which took minutes, by every way to it


def reach(calls: dict[str, str], name: str) -> set[str]:
    """``name``, and what it calls."""
    found, more = set[str](), [name]
    while more:
        one = more.pop()
        if one not in found:
            found.add(one)
            more += calls[one]
    return found
