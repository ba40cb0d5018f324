"""Which loops the corpus counts as chains: what a member gives has to reach a later member."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rewriter.analyze.model.loops import Loop, find_loops, takes_apart
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source

from .flow import passes_on

NO_CHAIN = {
    "side by side": "for m in self.ms:\n    out.append(m(x))",
    "inputs of their own": "for name, m in self.ms.items():\n    given = inputs[name]\n    out[name] = m(**given)",
    "something else is carried": "for m in self.ms:\n    out.append(m(x))\n    x = self.pool(x)",
    "a sum": "for m in self.ms:\n    x = x + m(y)",
    "a sum at places": "for i, m in enumerate(self.ms):\n    x[i] = m(x[i])",
    "parts of one member": "for m in self.ms:\n    h = m.norm(x)\n    h = m.attn(h)\n    out.append(h)",
    "numbers": "for size in self.ms:\n    y = f(size, x)\n    x = x / 2",
    "setup": "for i, m in enumerate(self.ms):\n    cfg = self.update(cfg, m.width)\n    m.add(name, cfg)",
    "attributes of members": "for m in self.ms:\n    end = start + m.size\n    y = x[start:end]\n"
    "    out.append(m(y))\n    start = end",
    "given anew on both ways": "for m in self.ms:\n    if flag:\n        y = f(x)\n    else:\n        y = x\n"
    "    y = m(y)\n    out.append(y)",
    "pairs side by side": "for a, b in self.ms:\n    out.append(b(a(x)))",
}
CHAINS = {
    "plain": "for m in self.ms:\n    x = m(x)",
    "by other names": "for m in self.ms:\n    res = x\n    y = self.norm(x)\n    out = m(y)\n    x = res + out[0]",
    "through a list": "for m in self.ms:\n    xs.append(m(xs[-1]))",
    "through an object": "for m in self.ms:\n    data.x = m(data.x)",
    "through an attribute": "for i in range(3):\n    self.h = self.ms[i](self.h)",
    "from the place before": "for i, m in enumerate(self.ms):\n    x[i + 1] = m(x[i])",
    "two turns later": "for m in self.ms:\n    c = m(a)\n    a, b = b, c",
    "on one way": "for m in self.ms:\n    if flag:\n        continue\n    x = m(x)",
    "kept by a jump": "for m in self.ms:\n    y = m(x)\n    if flag:\n        x = y\n        continue\n    x = 0",
    "in place": "for m in self.ms:\n    x.add_(m(x))",
    "lists of members": "for m in self.ms:\n    for i, part in enumerate(m):\n        x = part(x)",
    "by a tuple in a tuple": "for m in self.ms:\n    (x, y), seen = m(x, y)",
    "methods": "for m in self.ms:\n    x = m.step(x)",
    "parts": "for m in self.ms:\n    x = x + m.attn(x)\n    x = m.mlp(x)",
    "by a helper": "for m in self.ms:\n    x = self.call(m, x)",
    "by a loop in it": "for m in self.ms:\n    for _ in range(2):\n        x = m(x)",
    "pairs": "for a, b in self.ms:\n    x = a(x) + x\n    x = b(x)",
    "with resources": "for m in self.ms:\n    with scope():\n        try:\n            y = m(x)\n        finally:\n"
    "            x = y",
}


def loops(loop: str) -> list[Loop]:
    lines = "\n        ".join(loop.split("\n"))
    text = f"class Net:\n    def forward(self, x, y, data, flag):\n        {lines}\n"
    file = Project().add(Source(Path("net.py"), text.encode()))
    info = file.class_info(next(node for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)))
    return list(find_loops(info))


def counted(loop: str) -> bool:
    return passes_on(loops(loop)[0])


@pytest.mark.parametrize("loop", NO_CHAIN.values(), ids=NO_CHAIN.keys())
def test_no_chain(loop: str) -> None:
    assert not counted(loop)


@pytest.mark.parametrize("loop", CHAINS.values(), ids=CHAINS.keys())
def test_chain(loop: str) -> None:
    assert counted(loop)


def test_tensors_are_no_groups() -> None:
    """A list of inputs beside the list of modules: only modules that are taken apart by a loop are groups."""
    body = "for i in range(3):\n    x = self.ms[i](*self.xs[i])\n    self.xs[i] = [a.cpu() for a in self.xs[i]]"
    assert not any(takes_apart(loop) for loop in loops(body))
    assert all(takes_apart(loop) for loop in loops("for m in self.ms:\n    for part in m:\n        x = part(x)"))
