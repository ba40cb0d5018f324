"""A loop over pairs of modules becomes a method of the pairs.

What: the body of ``for attn, ff in self.layers:`` moves into a class of its own, a ModuleList of the same members, of
which the TransformerBlockList is made. State-dict keys stay.
Why: a pair is no callable block. Without this it is whole while the loop has it in hand, but its activations are kept
and its gradients reduced late.
Refuses when: the body leaves early, loops, writes to objects or to ``self``, or gives a value that is not carried from
pair to pair; the list is used elsewhere. Applied only with --unsafe: the body runs again in backward.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.pairs import Pairs
from rewriter.analyze.read.file import File
from rewriter.changes import Arguments, Change, ReplaceStatement, insert_before, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    stacks = {(stack.owner, stack.path): stack for stack in facts.stacks.found}
    for pairs in facts.pairs:
        stack = stacks.get((pairs.owner, pairs.path))
        if pairs.owner.file is file and stack is not None and _can_move(pairs.loop.node):
            message = f"the loop over the pairs of {pairs.owner.name}.{pairs.path} is a method of the pairs"
            changes, requires = tuple(_changes(file, pairs)), stack.requirement()
            yield Conversion(RULE.code, pairs.loop.node.lineno, message, changes, unsafe=True, requires=requires)


def _can_move(loop: ast.For) -> bool:
    """Whether the body has lines of its own, and no string in it spans lines, which moving would change."""
    return loop.body[0].lineno > loop.lineno and not any(
        isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno != node.lineno for node in ast.walk(loop)
    )


def _changes(file: File, pairs: Pairs) -> Iterator[Change]:
    """Beside the changes that make the list a stack."""
    name = f"_{pairs.owner.name}Layer"
    while any(name in scope.bindings for scope in file.names.scopes.values()):
        name += "_"
    yield insert_before(pairs.owner.node, *_class_lines(file, pairs, name))
    for group in pairs.groups:
        yield replace(group.func, name)
    call = pairs.build.call
    assert isinstance(call, ast.Call)
    if len(pairs.carried) > 1:
        yield Arguments(call, added=(template(f"num_hidden={len(pairs.carried)}"),))
    arguments = ", ".join((*pairs.carried, *pairs.extra))
    run = template(f"{', '.join(pairs.carried)} = {{container}}({arguments})", container=pairs.loop.container)
    yield ReplaceStatement(pairs.loop.node, run, moved=True)


def _class_lines(file: File, pairs: Pairs, name: str) -> list[str]:
    """The new class. Its base is spelled as the members' was."""
    arguments = ", ".join((*pairs.carried, *pairs.extra))
    return [
        f"class {name}({file.source.code(pairs.groups[0].func)}):",
        f"    def forward(self, {arguments}):",
        f"        {', '.join(pairs.members)} = self",
        *(f"        {line}" if line else "" for line in _lines(file, pairs.loop.node)),
        f"        return {', '.join(pairs.carried)}",
        "",
        "",
    ]


def _lines(file: File, loop: ast.For) -> Iterator[str]:
    """The lines of a loop's body, with four spaces for each level that they are deeper; first its head's comments."""
    source, unit, body = file.source, file.source.indent_unit, loop.body
    yield from (text for line, text in source.comments.items() if loop.lineno <= line < body[0].lineno)
    begins = {item.lineno for statement in body for item in ast.walk(statement) if isinstance(item, ast.stmt)}
    level, last = 0, body[-1].end_lineno or body[-1].lineno
    for number in range(body[0].lineno, last + 1):
        text = source.line(number).decode().rstrip("\r\n").removeprefix(source.indent(body[0]))
        if number in begins or text.lstrip().startswith(("#", "else:")):
            level = (len(text) - len(text.lstrip())) // len(unit)
        yield "    " * level + text.removeprefix(unit * level) if text.strip() else ""


RULE = Rule(
    code="BMT007",
    title="a loop over pairs of modules becomes a method of the pairs",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torch import nn


class Transformer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(nn.ModuleList([Attention(), FeedForward()]))

    def forward(self, x, mask=None):
        for attn, ff in self.layers:
            x = attn(x, mask=mask) + x
            x = ff(x) + x
        return x
""",
            """import torch
from torch import nn
import bmtrain as bmt


class _TransformerLayer(nn.ModuleList):
    def forward(self, x, mask):
        attn, ff = self
        x = attn(x, mask=mask) + x
        x = ff(x) + x
        return x


class Transformer(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([])
        for _ in range(depth):
            self.layers.append(bmt.CheckpointBlock(_TransformerLayer([Attention(), FeedForward()])))

    def forward(self, x, mask=None):
        x = self.layers(x, mask)
        return x
""",
            unsafe=True,
        ),
    ),
)
