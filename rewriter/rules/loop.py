"""A loop over the blocks is one call of the list.

What: ``for m in self.layers: x = m(x, mask)`` becomes ``x = self.layers(x, mask)``.
Why: it is shorter. The list gathers, prefetches and releases in a loop just the same, so a loop that is not provably
the same as one call stays.
Refuses when: the body does anything else; an argument is a call, changes from block to block, or has perhaps no value
when there are no blocks; the loop variable is used later; the range is not provably the list's length; the list may be
something else in a subclass, or is replaced from outside.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.call_form import CallForm
from rewriter.analyze.facts import Facts
from rewriter.analyze.loops import Loop
from rewriter.analyze.project import File
from rewriter.analyze.source import Source
from rewriter.types import Edit, Example, Finding, Rule, Safety, Span


def find(file: File, facts: Facts) -> Iterator[Finding]:
    for stack in facts.stacks.found:
        for loop in stack.loops:
            if loop.file is file and loop.node in stack.calls:
                form = stack.calls[loop.node]
                what = "the loop with its checkpoint branch" if form.checkpoint else "the loop"
                yield Finding(
                    RULE.code,
                    loop.node.lineno,
                    f"{what} over {stack.name} is one call",
                    tuple(_edits(file.source, loop, form)),
                    requires=stack.requirement(),
                )
    reasons = dict.fromkeys((getattr(x.node, "lineno", 1), x.reason) for x in facts.stacks.left if x.file is file)
    for line, reason in reasons:
        yield Finding(RULE.code, line, f"loop kept: {reason}", safety=Safety.REPORT)


def _edits(source: Source, loop: Loop, form: CallForm) -> Iterator[Edit]:
    call = form.call
    container = source.code(loop.container)
    span = source.span(loop.node)
    first, last = source.span(call.func).end, source.span(call).end
    indent = source.indent(loop.node)
    comments = [
        f"{text}{source.newline}{indent}"
        for line, text in _inner_comments(source, loop.node)
        if not call.lineno <= line < (call.end_lineno or call.lineno)
    ]
    targets = ", ".join(form.targets)
    yield Edit(span, (*comments, f"{targets} = {container}", Span(first, last)))


def _inner_comments(source: Source, node: ast.For) -> Iterator[tuple[int, str]]:
    """Comments of the loop that the call would lose: all but the one behind its last line."""
    assert node.end_lineno is not None
    for line in range(node.lineno, node.end_lineno):
        if line in source.comments:
            yield line, source.comments[line]


RULE = Rule(
    code="BMT004",
    title="a loop over the blocks is one call of the list",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import bmtrain as bmt


class Net(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for _ in range(depth)])

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x
""",
            """import bmtrain as bmt


class Net(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for _ in range(depth)])

    def forward(self, x, mask):
        x = self.layers(x, mask=mask)
        return x
""",
        ),
        Example(
            """import bmtrain as bmt


class Net(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x, layer
""",
        ),
    ),
)
