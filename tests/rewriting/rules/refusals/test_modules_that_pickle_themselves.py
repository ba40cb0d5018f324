"""Modules with a ``__reduce__`` of their own, or from a decorator of the project: shards cannot be pickled so."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

DECORATOR = """def persistent(cls):
    class Decorator(cls):
        def __reduce__(self):
            return (make, (self.__dict__,))

    return Decorator


"""
LOOP = """

net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in xs:
    net(x).mean().backward()
    opt.step()
"""
NET = """{decorator}class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x)
{more}"""
OTHERS = [DECORATOR.replace("__reduce__", "describe"), "def persistent(cls):\n    return cls\n\n\n"]
REDUCE = "\n    def __reduce__(self):\n        return (Net, (), self.state_dict())\n"


def told(decorator: str, more: str = "", before: str = DECORATOR) -> int:
    text = "import torch\nfrom torch import nn\n\n" + before + NET.format(decorator=decorator, more=more) + LOOP
    result = convert_text(text)
    assert not result.error
    return sum("pickles itself" in said.message for said in result.reported)


@pytest.mark.parametrize("decorator", ["@persistent\n", "@persistent\n@other\n"])
def test_a_decorator_that_makes_them_do_so_is_said(decorator: str) -> None:
    assert told(decorator) == 1


def test_a_method_of_their_own_is_said() -> None:
    assert told("", REDUCE) == 1
    assert told("", REDUCE.replace("__reduce__(self", "__reduce_ex__(self, protocol")) == 1


@pytest.mark.parametrize(
    "before", [DECORATOR.replace("__reduce__", "describe"), "def persistent(cls):\n    return cls\n\n\n"]
)
def test_other_decorators_are_not(before: str) -> None:
    assert told("@persistent\n", before=before) == 0


def test_what_is_no_module_may() -> None:
    text = DECORATOR + "@persistent\nclass Settings:\n    pass\n\n\n"
    assert told("", before=text) == 0
