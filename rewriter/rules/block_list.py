"""A stack of blocks is a bmt.TransformerBlockList.

What: the ModuleList (or ``Sequential(*blocks)``) that holds the model's blocks becomes a TransformerBlockList, each
member a CheckpointBlock. A ModuleDict, a container class of the project or a Sequential with names stays what it is;
its members become CheckpointBlocks. So do pairs and namespaces of parts: each is whole while a loop has it in hand. A
list that a constructor is given, that a function returns among other things, or that torch's own encoder makes, becomes
one where it is assigned.
Why: a block gathers its parameters just before it runs and releases them after; the list knows what runs next and
gathers it ahead of time. State-dict keys stay.
Refuses when: the members are heads, experts, norms or single torch layers; no loop carries anything from member to
member; a loop calls parts of a member beside the member; the list is inside another stack's block.
``--blocks 'GPT.h'``, or a comment ``# bmt: blocks`` where the list is made, names a stack that is not recognised.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.elements import FROM_ELSEWHERE, Build, Element
from rewriter.analyze.facts import Facts
from rewriter.analyze.project import File
from rewriter.analyze.stack import Stack
from rewriter.types import Edit, Example, Finding, Part, Rule, Span


def find(file: File, facts: Facts) -> Iterator[Finding]:
    for stack in facts.stacks.found:
        if stack.owner.file is not file:
            continue
        edits = [edit for build in stack.builds for edit in _build(file, facts, stack, build)]
        if edits:
            line = stack.builds[0].call.lineno
            yield Finding(
                RULE.code, line, f"{stack.name} is a stack of blocks", tuple(dict.fromkeys(edits)), key=stack.key()
            )


def _build(file: File, facts: Facts, stack: Stack, build: Build) -> Iterator[Edit]:
    call, alias = build.call, facts.alias(file)
    width = f", num_hidden={stack.num_hidden}" if stack.num_hidden != 1 else ""
    elsewhere = build.form in FROM_ELSEWHERE and not build.is_stack_already
    seen = build.elements and all(_can_be_wrapped(element) for element in build.elements)
    if not stack.use_checkpoint and (elsewhere or not seen):
        width += ", use_checkpoint=False"
    span = file.source.span(call)
    if not stack.whole:
        for element in build.elements:
            if element.kind == "block" or (build.form == "kept" and element.kind == "unknown"):
                yield from _wrapped(file, alias, stack, element)
        return
    if build.form == "attribute" and elsewhere:
        yield _replaced(file, alias, build, width)
        return
    if elsewhere:
        yield Edit(span, (f"{alias}.TransformerBlockList(", span, f"{width})"), 5)
        return
    if build.is_stack_already:
        return  # the list wraps what it is given
    assert isinstance(call, ast.Call)
    yield Edit(file.source.span(call.func), (f"{alias}.TransformerBlockList",))
    yield from list_arguments(file, call, width)
    for element in build.elements:
        yield from _element(file, alias, stack, element)


def _replaced(file: File, alias: str, build: Build, width: str) -> Edit:
    """The attribute becomes a list of blocks behind the statement that gives it something else."""
    statement = next(node for node in file.names.ancestors(build.call) if isinstance(node, ast.stmt))
    attribute = f"{build.function.args.args[0].arg}.{build.path}"
    return file.source.insert_after(statement, [f"{attribute} = {alias}.TransformerBlockList({attribute}{width})"])


def list_arguments(file: File, call: ast.Call, width: str) -> Iterator[Edit]:
    source = file.source
    end = source.span(call).end
    if not call.args and not call.keywords:
        yield Edit(Span(end - 1, end - 1), ("[]",))
        if width:
            yield Edit(Span(end - 1, end - 1), (width,), 10)
        return
    if call.args and isinstance(call.args[0], ast.Starred):
        star = source.span(call.args[0])
        yield Edit(star, (source.span(call.args[0].value),))
    value = call.args[0] if call.args else call.keywords[0].value
    if isinstance(value, ast.Starred):
        value = value.value
    span = source.span(value)
    if width and span.end == end:  # a bare generator shares its parentheses with the call
        yield Edit(span, ("(", span, f"{width})"), 10)
    elif width:
        yield Edit(Span(span.end, span.end), (width,), 10)


def _element(file: File, alias: str, stack: Stack, element: Element) -> Iterator[Edit]:
    if element.kind != "wrapped" and _can_be_wrapped(element):
        yield from _wrapped(file, alias, stack, element)


def _can_be_wrapped(element: Element) -> bool:
    return element.kind == "wrapped" or isinstance(element.node, (ast.Call, ast.IfExp))


def _wrapped(file: File, alias: str, stack: Stack, element: Element) -> Iterator[Edit]:
    span = file.source.span(element.node)
    tail: Part = ")" if stack.use_checkpoint else ", use_checkpoint=False)"
    yield Edit(span, (f"{alias}.CheckpointBlock(", span, tail), 2)


RULE = Rule(
    code="BMT003",
    title="a stack of blocks is a bmt.TransformerBlockList",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch


class Net(torch.nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for index in range(depth):
            self.layers.append(Layer(index))

    def forward(self, x, seen):
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return x
""",
            """import torch
import bmtrain as bmt


class Net(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([])
        for index in range(depth):
            self.layers.append(bmt.CheckpointBlock(Layer(index)))

    def forward(self, x, seen):
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return x
""",
        ),
        Example(
            """from torch import nn


class Net(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([Attn(), FF()]) for _ in range(n)])

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x
""",
            """from torch import nn
import bmtrain as bmt


class Net(bmt.DistributedModule):
    def __init__(self, n):
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(nn.ModuleList([Attn(), FF()])) for _ in range(n)])

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x
""",
        ),
    ),
)
