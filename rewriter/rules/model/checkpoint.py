"""A block checkpoints itself.

What: ``if self.saving: x = checkpoint(block, x) else: x = block(x)`` over a stack of blocks becomes ``x = block(x)``;
so does the same choice between ``checkpoint_seq(self.blocks, x)`` and ``self.blocks(x)``.
Why: a CheckpointBlock recomputes what memory demands. With the branch left in, blocks would be recomputed twice.
Refuses when: the two sides do not make the same call, the test does more than read flags, or the blocks fill a cache.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.checkpoints import collapse_checkpoint, collapse_whole
from rewriter.analyze.model.stack import Stack
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.changes import Keep
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if b"checkpoint" not in file.source.data:
        return
    for stack in facts.stacks.found:
        if not stack.use_checkpoint:
            continue
        for branch, plain in _branches(file, facts, stack):
            message = f"the blocks of {stack.name} checkpoint themselves"
            changes = (Keep(branch, plain),)
            yield Conversion(RULE.code, branch.lineno, message, changes, requires=stack.requirement())


def _branches(file: File, facts: Facts, stack: Stack) -> Iterator[tuple[ast.If, ast.Assign]]:
    for loop in stack.loops:
        if loop.file is file and loop.node not in stack.calls:
            for statement in loop.node.body:
                for node in walk(statement):
                    if isinstance(node, ast.If) and not _is_elif(file, node):
                        plain = collapse_checkpoint(file, loop.is_element, node, facts.project)
                        if not isinstance(plain, str):
                            yield node, plain
    if stack.owner.file is file:
        for function in stack.owner.methods.values():
            me = function.args.args[0].arg if function.args.args else ""
            for node in walk(function):
                if isinstance(node, ast.If) and not _is_elif(file, node):
                    whole = collapse_whole(node, stack.path, me)
                    if whole is not None:
                        yield node, whole


def _is_elif(file: File, node: ast.If) -> bool:
    return file.source.code(node).startswith("elif")


RULE = Rule(
    code="BMT005",
    title="a block checkpoints itself",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import bmtrain as bmt
from torch.utils.checkpoint import checkpoint


class Net(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for _ in range(depth)])

    def forward(self, x, seen):
        for layer in self.layers:
            if self.saving and self.training:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
            seen.append(x)
        return x
""",
            """import bmtrain as bmt
from torch.utils.checkpoint import checkpoint


class Net(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for _ in range(depth)])

    def forward(self, x, seen):
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return x
""",
        ),
    ),
)
