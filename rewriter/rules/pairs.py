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
from rewriter.analyze.pairs import Pairs
from rewriter.analyze.project import File
from rewriter.rules.block_list import list_arguments
from rewriter.types import Edit, Example, Finding, Rule, Safety


def find(file: File, facts: Facts) -> Iterator[Finding]:
    stacks = {(stack.owner, stack.path): stack for stack in facts.stacks.found}
    for pairs in facts.pairs:
        stack = stacks.get((pairs.owner, pairs.path))
        if pairs.owner.file is file and stack is not None and not _has_long_string(pairs.loop.node):
            message = f"the loop over the pairs of {pairs.owner.name}.{pairs.path} is a method of the pairs"
            edits = tuple(_edits(file, pairs))
            requires = stack.requirement()
            yield Finding(RULE.code, pairs.loop.node.lineno, message, edits, safety=Safety.UNSAFE, requires=requires)


def _has_long_string(loop: ast.For) -> bool:
    """Whether a string spans lines, so that moving the body would change it."""
    return any(
        isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno != node.lineno for node in ast.walk(loop)
    )


def _edits(file: File, pairs: Pairs) -> Iterator[Edit]:
    """Beside the edits that make the list a stack."""
    source = file.source
    name = f"_{pairs.owner.name}Layer"
    while any(name in scope.bindings for scope in file.names.scopes.values()):
        name += "_"
    yield source.insert_before(pairs.owner.node, _class_lines(file, pairs, name))
    for group in pairs.groups:
        yield Edit(source.span(group.func), (name,))
    call = pairs.build.call
    assert isinstance(call, ast.Call)
    if len(pairs.carried) > 1:
        yield from list_arguments(file, call, f", num_hidden={len(pairs.carried)}")
    arguments = ", ".join((*pairs.carried, *pairs.extra))
    container = source.code(pairs.loop.container)
    yield Edit(source.span(pairs.loop.node), (f"{', '.join(pairs.carried)} = {container}({arguments})",))


def _class_lines(file: File, pairs: Pairs, name: str) -> list[str]:
    """The new class. Its base is spelled as the members' was."""
    source, unit, body = file.source, file.source.indent_unit, pairs.loop.node.body
    indent = source.indent(body[0])
    arguments = ", ".join((*pairs.carried, *pairs.extra))
    lines = [
        f"class {name}({source.code(pairs.groups[0].func)}):",
        f"{unit}def forward(self, {arguments}):",
        f"{unit * 2}{', '.join(pairs.members)} = self",
    ]
    last = body[-1].end_lineno or body[-1].lineno
    first = body[0].lineno
    for line in range(first, last + 1):
        text = source.data[source.line_start(line) : source.line_end(line)].decode().rstrip("\r\n")
        lines.append(f"{unit * 2}{text.removeprefix(indent)}" if text.strip() else "")
    lines.append(f"{unit * 2}return {', '.join(pairs.carried)}")
    return [*lines, "", ""]


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
