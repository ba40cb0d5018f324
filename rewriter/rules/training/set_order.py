"""Words of a set are gone through in one order by all ranks.

What: ``list(set(words))`` becomes ``list(sorted(set(words)))``, and so do ``enumerate``, ``tuple`` and loops over a set
of words, or over a name that holds one.
Why: Python begins each process with another order for sets of text. A vocabulary that is numbered by it is each rank's
own: the same row of an embedding stands for other words, and nothing fails.
Refuses when: it is not seen that the set holds text; then the line is reported, unless numbers are seen in it. A loop
that only makes a set of it, or adds up, is left.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.changes import wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_LISTS = {"list", "tuple", "enumerate", "zip", "iter"}
_TEXT_METHODS = {
    "split", "splitlines", "rsplit", "lower", "upper", "strip", "join", "read", "read_text", "readlines", "replace",
    "rstrip", "lstrip", "title", "format", "word_tokenize", "tokenize",
}  # fmt: skip
_TEXT_NAMES = re.compile(
    r"(?:^|_)(?:text|words?|char(?:acter)?s?|sentences?|tokens?|corpus|letters?|vocab)(?:_|$)", re.I
)
_NUMBER_NAMES = re.compile(
    r"(?:^|_)(?:labels?|targets?|ids?|idx|index|indices|y|classes|num(?:ber)?s?|ranks?|sizes?|lengths?)(?:_|$)", re.I
)
_NUMBER_CALLS = {"range", "int", "len", "tolist", "numpy", "item", "arange", "randint", "float", "argmax", "flatten"}
_DEEP = 3


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for value in _gone_through(file):
        made = _sets(file, value)
        if not made or not file.source.is_exact(value):
            continue
        if any(_holds(file, item, "text") for item in made):
            message = "all ranks go through these words in one order"
            yield Conversion(RULE.code, value.lineno, message, (wrap(value, "sorted({it})"),))
        elif not all(_holds(file, item, "numbers") for item in made):
            code = file.source.code(value)
            message = f"if {code} holds text, every rank has it in another order: write sorted({code})"
            yield Remark(RULE.code, value.lineno, message, differs=True)


def _gone_through(file: File) -> Iterator[ast.expr]:
    """What is made a list of, or gone through by a loop whose result is in its order."""
    for node in file.nodes:
        match node:
            case ast.Call(func=ast.Name(id=name), args=args) if name in _LISTS:
                if not _is_unordered(file, node):
                    yield from args
            case ast.ListComp(generators=[first, *_]) | ast.DictComp(generators=[first, *_]):
                if not _is_unordered(file, node):
                    yield first.iter
            case ast.For(iter=iterated) if any(map(_keeps_order, walk(node))):
                yield iterated


def _keeps_order(node: ast.AST) -> bool:
    """``numbers[word] = len(numbers)``, ``rows.append(word)``."""
    match node:
        case ast.Assign(targets=[ast.Subscript()]):
            return True
        case ast.Call(func=ast.Attribute(attr="append" | "write")):
            return True
    return False


def _is_unordered(file: File, node: ast.expr) -> bool:
    """Whether what takes a list puts it in order, or asks for no order: ``sorted(list(words))``, ``len(...)``."""
    parent = file.names.parents[node]
    while isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in _LISTS:
        parent = file.names.parents[parent]
    if isinstance(parent, ast.Assign) and isinstance(node, ast.Call) and len(parent.targets) == 1:
        target = parent.targets[0]
        return isinstance(target, ast.Name) and _is_only_asked(file, target)
    called = (dotted(parent.func) or "").split(".")[-1] if isinstance(parent, ast.Call) else ""
    return called in {"sorted", "len", "set", "frozenset", "sum", "max", "min", "any", "all"}


def _is_only_asked(file: File, target: ast.Name) -> bool:
    """Whether a name of a function serves only to ask what is in it, or how much: ``if name in common``."""
    function = file.names.function_of(target)
    reads = [
        node
        for node in (walk(function) if function is not None else ())
        if isinstance(node, ast.Name) and node.id == target.id and isinstance(node.ctx, ast.Load)
    ]
    return bool(reads) and all(_asks(file, node) for node in reads)


def _asks(file: File, node: ast.Name) -> bool:
    match file.names.parents[node]:
        case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[held]):
            return held is node
        case ast.Call(func=ast.Name(id="len" | "set" | "sorted")):
            return True
    return False


def _sets(file: File, node: ast.expr, deep: int = 0) -> list[ast.expr]:
    """The sets that a value is, if it is one whatever is assigned to its name: what each is made of."""
    match node:
        case ast.Call(func=ast.Name(id="set" | "frozenset"), args=[made], keywords=[]):
            return [made]
        case ast.SetComp() | ast.Set():
            return [node]
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub(), right=right):
            one, other = _sets(file, left, deep), _sets(file, right, deep)
            return [*one, *other] if one and other else []
        case ast.Name() if deep < _DEEP:
            found = [_sets(file, value, deep + 1) for value in file.names.values_of(node)]
            return [item for made in found for item in made] if found and all(found) else []
    return []


def _holds(file: File, node: ast.expr, kind: str, deep: int = 0) -> bool:
    """Whether what a set is made of is seen to be ``text``, or ``numbers``."""
    match node:
        case ast.Constant(value=value):
            return isinstance(value, str if kind == "text" else (int, float))
        case ast.JoinedStr():
            return kind == "text"
        case ast.Set(elts=elts) | ast.List(elts=elts) | ast.Tuple(elts=elts):
            return bool(elts) and all(_holds(file, item, kind, deep) for item in elts)
        case (
            ast.SetComp(elt=elt, generators=generators)
            | ast.GeneratorExp(elt=elt, generators=generators)
            | ast.ListComp(elt=elt, generators=generators)
        ):
            if isinstance(elt, ast.Name) and any(_holds(file, g.iter, kind, deep) for g in generators):
                return True
            return _holds(file, elt, kind, deep)
        case ast.BinOp(left=left, right=right):
            return _holds(file, left, kind, deep) or _holds(file, right, kind, deep)
    called = {
        item.func.attr if isinstance(item.func, ast.Attribute) else getattr(item.func, "id", "")
        for item in walk(node)
        if isinstance(item, ast.Call)
    }
    if called & (_TEXT_METHODS if kind == "text" else _NUMBER_CALLS):
        return True
    names = _TEXT_NAMES if kind == "text" else _NUMBER_NAMES
    if isinstance(node, (ast.Name, ast.Attribute)) and names.search((dotted(node) or "").split(".")[-1]):
        return True
    if isinstance(node, ast.Name) and deep < _DEEP:
        return any(_holds(file, value, kind, deep + 1) for value in file.names.values_of(node))
    return False


RULE = Rule(
    code="BMT047",
    title="words of a set are gone through in one order by all ranks",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
words = "to be or not to be".split()
numbers = {word: number for number, word in enumerate(set(words))}
model = bmt.BMTrainModelWrapper(torch.nn.Embedding(len(numbers), 4))
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
optim_manager.backward(model(torch.tensor([numbers[word] for word in words])).mean())
optim_manager.step()
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
words = "to be or not to be".split()
numbers = {word: number for number, word in enumerate(sorted(set(words)))}
model = bmt.BMTrainModelWrapper(torch.nn.Embedding(len(numbers), 4))
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
optim_manager.backward(model(torch.tensor([numbers[word] for word in words])).mean())
optim_manager.step()
""",
        ),
    ),
)
