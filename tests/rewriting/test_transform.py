# ruff: noqa: E501 - tables of code are easier to read on one line
"""Changes applied to small files: what composes, what keeps its comments and its layout, what is refused."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from rewriter.analyze.read.file import File
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source
from rewriter.changes import (
    Arguments,
    Change,
    Insert,
    Keep,
    Remove,
    ReplaceStatement,
    Template,
    Unblock,
    Under,
    insert_before,
    insert_behind,
    replace,
    template,
    wrap,
)
from rewriter.plan import Plan
from rewriter.rewrite import rewritten
from rewriter.types import InputError

ONE_RANK = template("if {bmt}.rank() == 0:")


def find(file: File, code: str) -> ast.expr:
    """The first expression that reads so."""
    found = (node for node in file.nodes if isinstance(node, ast.expr) and file.source.code(node) == code)
    return next(node for node in found if not isinstance(getattr(node, "ctx", None), ast.Store))


def call(file: File, code: str) -> ast.Call:
    node = find(file, code)
    assert isinstance(node, ast.Call)
    return node


def line(file: File, number: int) -> ast.stmt:
    """The first statement that begins in a line."""
    return next(node for node in file.nodes if isinstance(node, ast.stmt) and node.lineno == number)


def changed(text: str, *makers: Callable[[File], Change]) -> str:
    file = Project().add(Source(Path("snippet.py"), text.encode()))
    return rewritten(file, Plan(tuple(make(file) for make in makers))).decode()


# Expressions: a hole receives the updated node ----------------------------------------------------------------------

EXPRESSIONS = {
    "one inside another": ("f(g(1))\n", "F(G(1))\n", ["f", "g"]),
    "the inner one first": ("f(g(1))\n", "F(G(1))\n", ["g", "f"]),
    "in parentheses": ("(f)(1)\n", "(F)(1)\n", ["f"]),
    "over lines": ("x = f(\n    a,  # one\n    g,\n)\n", "x = F(\n    a,  # one\n    G,\n)\n", ["f", "g"]),
    "odd spaces": ("x  =f (g ,h)\n", "x  =F (G ,h)\n", ["f", "g"]),
    "behind a backslash": ("x = a + \\\n    f(1)\n", "x = a + \\\n    F(1)\n", ["f"]),
    "in a comprehension": ("[f(x) for x in g if h]\n", "[F(x) for x in G if H]\n", ["f", "g", "h"]),
    "in a lambda's default": ("k = lambda a=f: a\n", "k = lambda a=F: a\n", ["f"]),
    "in an f-string": ("print(f'{f(1):>{g}}')\n", "print(f'{F(1):>{G}}')\n", ["f", "g"]),
    "in strings side by side": ("x = 'a' f'{f}' 'b'\n", "x = 'a' f'{F}' 'b'\n", ["f"]),
    "two on a line": ("f(1); g(2)\n", "F(1); G(2)\n", ["f", "g"]),
    "behind a colon": ("if h: f(1); g(2)\n", "if H: F(1); G(2)\n", ["f", "g", "h"]),
    "decorators": ("@f(1)\n@(\n    g\n)\ndef k(): pass\n", "@F(1)\n@(\n    G\n)\ndef k(): pass\n", ["f", "g"]),
    "nested decorators": (
        "class K:\n    @f  # why\n\n    @g\n    def k(self): pass\n",
        "class K:\n    @F  # why\n\n    @G\n    def k(self): pass\n",
        ["f", "g"],
    ),
    "annotations and defaults": ("def k(a: f = g) -> h: pass\n", "def k(a: F = G) -> H: pass\n", ["f", "g", "h"]),
    "elif and else": (
        "if a:\n    b\nelif f:\n    c\nelse:\n    g\n",
        "if a:\n    b\nelif F:\n    c\nelse:\n    G\n",
        ["f", "g"],
    ),
    "loops and their else": (
        "for a in f:\n    pass\nelse:\n    while g:\n        h\n    else:\n        k\n",
        "for a in F:\n    pass\nelse:\n    while G:\n        H\n    else:\n        k\n",
        ["f", "g", "h"],
    ),
    "try": (
        "try:\n    a\nexcept f as e:\n    b\nexcept (c, g): d\nelse:\n    h\nfinally:\n    k\n",
        "try:\n    a\nexcept F as e:\n    b\nexcept (c, G): d\nelse:\n    H\nfinally:\n    k\n",
        ["f", "g", "h"],
    ),
    "with": ("with f() as a, g(b) as c:\n    h\n", "with F() as a, G(b) as c:\n    H\n", ["f", "g", "h"]),
    "match": (
        "match f:\n    case 1 if a:\n        g\n    case _: h\n",
        "match F:\n    case 1 if a:\n        G\n    case _: H\n",
        ["f", "g", "h"],
    ),
    "async": (
        "async def k():\n    async with f as a:\n        async for b in g:\n            await h\n",
        "async def k():\n    async with F as a:\n        async for b in G:\n            await H\n",
        ["f", "g", "h"],
    ),
    "tabs": ("if a:\n\tif b:\n\t\tf(c,\n\t\t  g)\n", "if a:\n\tif b:\n\t\tF(c,\n\t\t  G)\n", ["f", "g"]),
    "mixed indentation": ("if a:\n  if b:\n        f(c,\n  g)\n", "if a:\n  if b:\n        F(c,\n  G)\n", ["f", "g"]),
    "letters of several bytes": ("é = 'äöü', f  # ß\n", "é = 'äöü', F  # ß\n", ["f"]),
}


@pytest.mark.parametrize(("before", "after", "names"), EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
def test_names_in_every_place(before: str, after: str, names: list[str]) -> None:
    makers = [lambda file, name=name: replace(find(file, name), name.upper()) for name in names]
    assert changed(before, *makers) == after


def test_a_change_of_a_hole_is_not_lost() -> None:
    after = changed(
        "loss(x).backward()\n",
        lambda f: replace(call(f, "loss(x).backward()"), "m.backward({loss})", loss=call(f, "loss(x)")),
        lambda f: replace(find(f, "loss"), "mean_loss"),
        lambda f: replace(find(f, "x"), "{it}.y", it=find(f, "x")),
    )
    assert after == "m.backward(mean_loss(x.y))\n"


def test_changes_of_one_node_apply_in_order() -> None:
    one, two = (lambda f: wrap(find(f, "a"), "inner({it})")), (lambda f: wrap(find(f, "a"), "outer({it})"))
    assert changed("a\n", one, two) == "outer(inner(a))\n"


PARENTHESES = {
    "an argument needs none": ("(a or b).f()\n", "(a or b).f()", "g({x})", "g(a or b)\n"),
    "an operand does": ("(a or b).f()\n", "(a or b).f()", "{x} + 1", "(a or b) + 1\n"),
    "a choice in a choice": ("(a if b else c).f()\n", "(a if b else c).f()", "1 if {x} else 2", "1 if (a if b else c) else 2\n"),
    "a comparison in a choice": ("(a == b).f()\n", "(a == b).f()", "1 if {x} else 2", "1 if a == b else 2\n"),
    "lines keep theirs": ("(a ==\n b).f()\n", "(a ==\n b).f()", "{x}", "(a ==\n b)\n"),
    "comments keep theirs": ("(  # why\n a).f()\n", "(  # why\n a).f()", "g({x})", "g((  # why\n a))\n"),
    "a walrus": ("(a := b).f()\n", "(a := b).f()", "g({x})", "g((a := b))\n"),
    "a bare tuple": ("x = (a, b).f()\n", "(a, b).f()", "g({x})", "x = g((a, b))\n"),
    "a dict's braces are no hole": ("a.f()\n", "a.f()", '[{"params": {x}}]', '[{"params": a}]\n'),
}  # fmt: skip


@pytest.mark.parametrize(("before", "node", "by", "after"), PARENTHESES.values(), ids=PARENTHESES.keys())
def test_parentheses(before: str, node: str, by: str, after: str) -> None:
    def make(file: File) -> Change:
        target = next(n for n in file.nodes if isinstance(n, ast.Call) and file.source.code(n) == node)
        assert isinstance(target.func, ast.Attribute)
        return replace(target, by, x=target.func.value)

    assert changed(before, make) == after


# Arguments -----------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "none yet": ("f()\n", "f(k=1)\n"),
    "behind another": ("f(a)\n", "f(a, k=1)\n"),
    "a trailing comma": ("f(\n    a,\n)\n", "f(\n    a, k=1,\n)\n"),
    "no trailing comma": ("f(\n    a\n)\n", "f(\n    a, k=1\n)\n"),
    "a bare generator": ("f(a for a in b)\n", "f((a for a in b), k=1)\n"),
    "stars": ("f(*a, **b)\n", "f(*a, **b, k=1)\n"),
    "comments": ("f(\n    a,  # one\n    b,  # two\n)\n", "f(\n    a,  # one\n    b, k=1,  # two\n)\n"),
}


@pytest.mark.parametrize(("before", "after"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_an_argument_more(before: str, after: str) -> None:
    assert changed(before, lambda f: Arguments(call(f, before.strip()), added=(template("k=1"),))) == after


DROPPED = {
    "the only one": ("f(a=1)\n", "f()\n"),
    "the first": ("f(a=1, b=2)\n", "f(b=2)\n"),
    "the last": ("f(b=2, a=1)\n", "f(b=2)\n"),
    "the last, over lines": ("f(\n    b,\n    a=1,\n)\n", "f(\n    b,\n)\n"),
    "a comment inside it": ("x = f(\n    b, a=g(\n        1,  # why\n    ))\n", "# why\nx = f(\n    b)\n"),
    "the comment behind it": ("x = f(\n    b,\n    a=1,  # why\n)\n", "x = f(\n    b,  # why\n)\n"),
}


@pytest.mark.parametrize(("before", "after"), DROPPED.values(), ids=DROPPED.keys())
def test_an_argument_less(before: str, after: str) -> None:
    def make(file: File) -> Change:
        node = next(node for node in file.nodes if isinstance(node, ast.Call))
        return Arguments(node, dropped=tuple(k for k in node.keywords if k.arg == "a"))

    assert changed(before, make) == after


def test_a_star_goes() -> None:
    def make(file: File) -> Change:
        node = call(file, "f(*a)")
        assert isinstance(node.args[0], ast.Starred)
        return Arguments(node, added=(template("n=2"),), unstarred=(node.args[0],))

    assert changed("f(*a)\n", make, lambda f: replace(find(f, "a"), "b")) == "f(b, n=2)\n"


def test_a_base_more() -> None:
    def make(file: File) -> Change:
        node = line(file, 1)
        assert isinstance(node, ast.ClassDef)
        return Arguments(node, added=(template("{bmt}.M"),))

    assert (
        changed("class A(B, metaclass=C):  # why\n    pass\n", make)
        == "class A(B, bmt.M, metaclass=C):  # why\n    pass\n"
    )


# Statements ----------------------------------------------------------------------------------------------------------

STATEMENTS: dict[str, tuple[str, str, list[Callable[[File], Change]]]] = {
    "before, below the comment": ("# c\na\n", "# c\nnew\na\n", [lambda f: insert_before(line(f, 2), "new")]),
    "behind, in front of the next comment": ("a\n# c\nb\n", "a\nnew\n# c\nb\n", [lambda f: insert_behind(line(f, 1), "new")]),
    "behind a block": ("if a:\n    b\n\nc\n", "if a:\n    b\nnew\n\nc\n", [lambda f: insert_behind(line(f, 1), "new")]),
    "at the end, without a newline": ("a", "a\nnew", [lambda f: insert_behind(line(f, 1), "new")]),
    "in a shared line": ("a; b\n", "a; new; b\n", [lambda f: insert_behind(line(f, 1), "new")]),
    "a block before a shared line": ("# c\na; b\n", "# c\nif x:\n    y\na; b\n", [lambda f: insert_before(line(f, 2), "if x:", "    y")]),
    "a block behind a shared line": ("a; b\n# c\n", "a; b\nif x:\n    y\n# c\n", [lambda f: insert_behind(f.tree.body[1], "if x:", "    y")]),
    "a block before a shared line that changes": ("a; b\n", "if x:\n    y\na; new; b\n", [lambda f: insert_before(line(f, 1), "if x:", "    y"), lambda f: insert_behind(line(f, 1), "new")]),
    "behind a colon": ("if a: b\n", "if a: new; b\n", [lambda f: insert_before(f.tree.body[0].body[0], "new")]),  # type: ignore[attr-defined]
    "nested lines, by the file's own measure": (
        "def f():\n\ta\n",
        "def f():\n\tif x:\n\t\ty\n\ta\n",
        [lambda f: insert_before(line(f, 2), "if x:", "    y")],
    ),
    "two at one place, in order": (
        "a\n", "one\ntwo\na\n",
        [lambda f: insert_before(line(f, 1), "one"), lambda f: insert_before(line(f, 1), "two")],
    ),
    "a statement goes, its comments stay": (
        "# above\na  # beside\nb\n", "# above\n# beside\nb\n", [lambda f: Remove(line(f, 2))],
    ),
    "comments inside stay, too": (
        "a(\n    b,  # one\n    # two\n)  # three\nc\n", "# one\n# two\n# three\nc\n", [lambda f: Remove(line(f, 1))],
    ),
    "the last of a block": ("if a:\n    # why\n    b  # c\nd\n", "if a:\n    # why\n    # c\n    pass\nd\n", [lambda f: Remove(line(f, 3))]),
    "the last of a file": ("a\nb  # c\n", "a\n# c\n", [lambda f: Remove(line(f, 2))]),
    "in a line with others": ("a; b; c\n", "a; pass; c\n", [lambda f: Remove(f.tree.body[1])]),
    "one line for a loop": (
        "for a in b:  # one\n    # two\n    c  # three\nd\n", "# one\n# two\nx = b  # three\nd\n",
        [lambda f: ReplaceStatement(line(f, 1), template("x = {b}", b=find(f, "b")))],
    ),
    "a comment at the end of a loop": (
        "for a in b:\n    c\n    # two\nd\n", "# two\nx = b\nd\n",
        [lambda f: ReplaceStatement(line(f, 1), template("x = {b}", b=find(f, "b")))],
    ),
    "one side stays": (
        "if a:  # one\n    # two\n    b\nelse:\n    # three\n    c  # four\nd\n", "# one\n# two\n# three\nc  # four\nd\n",
        [lambda f: Keep(line(f, 1), line(f, 6))],
    ),
    "one side stays, changed": (
        "if a:\n    b\nelse:\n    c(b)\n", ["if True:", "c(B)\n"][1],
        [lambda f: Keep(line(f, 1), line(f, 4)), lambda f: replace(f.tree.body[0].orelse[0].value.args[0], "B")],  # type: ignore[attr-defined]
    ),
    "a block opens": (
        "if a:  # one\n    # two\n    b\n\n    c(d,\n      e)\n    # three\nf\n", "# one\n# two\nb\n\nc(d,\n  e)\n# three\nf\n",
        [lambda f: Unblock(line(f, 1))],  # type: ignore[arg-type]
    ),
    "a block behind a colon opens": ("if a: b; c  # d\n", "b; c  # d\n", [lambda f: Unblock(line(f, 1))]),  # type: ignore[arg-type]
    "a string keeps its lines": (
        "if a:\n    b = '''\n  x\n'''\n", "b = '''\n  x\n'''\n", [lambda f: Unblock(line(f, 1))],  # type: ignore[arg-type]
    ),
    "under a head": (
        "# one\na(b,\n  c)  # two\nd\n", "# one\nif bmt.rank() == 0:\n    a(b,\n      c)  # two\nd\n",
        [lambda f: Under((line(f, 2),), ONE_RANK)],
    ),
    "neighbours under one head": (
        "a\n# one\nb\nc\n", "if bmt.rank() == 0:\n    a\n    # one\n    b\nc\n",
        [lambda f: Under((line(f, 1), line(f, 3)), ONE_RANK)],
    ),
    "with a value computed before": (
        "# why\nlog(x, loss.item())\n", "# why\nvalue = bmt.mean(loss).item()\nif bmt.rank() == 0:\n    log(x, value)\n",
        [
            lambda f: wrap(find(f, "loss"), "{bmt}.mean({it})"),
            lambda f: Under((line(f, 2),), ONE_RANK, (("value", find(f, "loss.item()")),)),
        ],
    ),
    "under a head in a block that opens": (
        "if r:\n    a\n    b  # c\n", "a\nif bmt.rank() == 0:\n    b  # c\n",
        [lambda f: Unblock(line(f, 1)), lambda f: Under((line(f, 3),), ONE_RANK)],  # type: ignore[arg-type]
    ),
    "a head around a head": (
        "for a in b:\n    c\n", "with w:\n    for a in b:\n        if bmt.rank() == 0:\n            c\n",
        [lambda f: Under((line(f, 2),), ONE_RANK), lambda f: Under((line(f, 1),), template("with w:"))],
    ),
    "what is inserted stays outside of a head": (
        "a\n", "v = m.s()\nif bmt.rank() == 0:\n    a\n",
        [lambda f: insert_before(line(f, 1), "v = m.s()"), lambda f: Under((line(f, 1),), ONE_RANK)],
    ),
    "blank lines behind new lines": (
        "# c\nclass A:\n    pass\n", "# c\nclass B:\n    pass\n\n\nclass A:\n    pass\n",
        [lambda f: Insert(line(f, 2), tuple(map(Template, ["class B:", "    pass", "", ""])))],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "makers"), STATEMENTS.values(), ids=STATEMENTS.keys())
def test_statements(before: str, after: str, makers: list[Callable[[File], Change]]) -> None:
    assert changed(before, *makers) == after


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_newlines_and_the_rest_stay(newline: str) -> None:
    before = f"import os{newline}{newline}x = 1 ;y=2{newline}\tif_ = 3{newline}".replace("\tif_", "z")
    before += f"def f( a,b ):{newline}  return  a{newline}{newline}{newline}f (1){newline}"
    after = changed(before, lambda f: insert_behind(f.tree.body[0], "new"), lambda f: replace(find(f, "f"), "g"))
    assert after == before.replace("import os", f"import os{newline}new").replace("f (1)", "g (1)")


REFUSED: dict[str, tuple[str, list[Callable[[File], Change]]]] = {
    "an elif as a statement": ("if a:\n    b\nelif c:\n    d\n", [lambda f: Unblock(line(f, 3))]),  # type: ignore[arg-type]
    "a shared line under a head": ("a; b\n", [lambda f: Under((line(f, 1),), ONE_RANK)]),
    "a block in a shared line": ("a; b\n", [lambda f: insert_behind(line(f, 1), "if x:", "    y")]),
    "a block behind a colon": ("if a: b\n", [lambda f: insert_before(f.tree.body[0].body[0], "if x:", "    y")]),  # type: ignore[attr-defined]
    "no Python": ("a\n", [lambda f: replace(find(f, "a"), "return")]),
}


@pytest.mark.parametrize(("text", "makers"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(text: str, makers: list[Callable[[File], Change]]) -> None:
    with pytest.raises(InputError):
        changed(text, *makers)


def test_changes_can_be_printed() -> None:
    file = Project().add(Source(Path("snippet.py"), b"loss(x).backward()\n"))
    node = call(file, "loss(x).backward()")
    assert str(replace(node, "m.backward({loss})", loss=call(file, "loss(x)"))) == (
        "1:0: loss(x).backward() -> m.backward(loss(x))"
    )
    assert str(Remove(line(file, 1))) == "1:0: loss(x).backward() goes"
