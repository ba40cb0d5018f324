"""A loop over the blocks is one call of the list.

What: ``for m in self.layers: x = m(x, mask)`` becomes ``x = self.layers(x, mask)``. In a loop that stays,
``m.forward(x)`` becomes ``m(x)``.
Why: it is shorter. The list gathers, prefetches and releases in a loop just the same, so a loop that is not provably
the same as one call stays.
Refuses when: the body does anything else; an argument is a call, changes from block to block, or has perhaps no value
when there are no blocks; the loop variable is used later; the range is not provably the list's length; the list may be
something else in a subclass, or is replaced from outside.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.call_form import CallForm
from rewriter.analyze.model.loops import Loop
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.changes import Change, ReplaceStatement, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    for stack in facts.stacks.found:
        for loop in stack.loops:
            if loop.file is file and loop.node in stack.calls:
                form = stack.calls[loop.node]
                what = "the loop with its checkpoint branch" if form.checkpoint else "the loop"
                message = f"{what} over {stack.name} is one call"
                changes = tuple(_changes(loop, form))
                yield Conversion(RULE.code, loop.node.lineno, message, changes, requires=stack.requirement())
            elif loop.file is file:
                for forward in _forwards(loop):
                    message = "the block is called, not its forward alone: so it is gathered"
                    change = replace(forward, "{block}", block=forward.value)
                    yield Conversion(RULE.code, forward.lineno, message, (change,), requires=stack.requirement())
    reasons = dict.fromkeys((getattr(x.node, "lineno", 1), x.reason) for x in facts.stacks.left if x.file is file)
    for line, reason in reasons:
        yield Remark(RULE.code, line, f"loop kept: {reason}")


def _forwards(loop: Loop) -> Iterator[ast.Attribute]:
    """``block.forward`` in a loop that stays."""
    for statement in loop.node.body:
        for node in walk(statement):
            if isinstance(node, ast.Attribute) and node.attr == "forward" and loop.is_element(node.value):
                yield node


def _changes(loop: Loop, form: CallForm) -> Iterator[Change]:
    yield replace(form.call.func, "{container}", container=loop.container)
    yield ReplaceStatement(loop.node, template(f"{', '.join(form.targets)} = {{call}}", call=form.call))


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
