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

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.elements import FROM_ELSEWHERE, Build, Element
from rewriter.analyze.model.stack import Stack
from rewriter.analyze.read.file import File
from rewriter.changes import Arguments, Change, insert_behind, replace, template, wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    for stack in facts.stacks.found:
        if stack.owner.file is not file:
            continue
        changes = tuple(dict.fromkeys(change for build in stack.builds for change in _build(file, stack, build)))
        if changes:
            line = stack.builds[0].call.lineno
            yield Conversion(RULE.code, line, f"{stack.name} is a stack of blocks", changes, key=stack.key())


def _build(file: File, stack: Stack, build: Build) -> Iterator[Change]:
    call = build.call
    options = [f"num_hidden={stack.num_hidden}"] if stack.num_hidden != 1 else []
    elsewhere = build.form in FROM_ELSEWHERE and not build.is_stack_already
    seen = build.elements and all(_can_be_wrapped(element) for element in build.elements)
    if not stack.use_checkpoint and (elsewhere or not seen):
        options.append("use_checkpoint=False")
    if not stack.whole:
        for element in build.elements:
            if element.kind == "block" or (build.form == "kept" and element.kind == "unknown"):
                yield _wrapped(stack, element)
        return
    if build.form == "attribute" and elsewhere:
        yield _replaced(file, build, options)
        return
    if elsewhere:
        yield wrap(call, f"{{bmt}}.TransformerBlockList({', '.join(['{it}', *options])})")
        return
    if build.is_stack_already:
        return  # the list wraps what it is given
    assert isinstance(call, ast.Call)
    yield replace(call.func, "{bmt}.TransformerBlockList")
    added = options if call.args or call.keywords else ["[]", *options]
    unstarred = tuple(argument for argument in call.args[:1] if isinstance(argument, ast.Starred))
    if added or unstarred:
        yield Arguments(call, added=tuple(map(template, added)), unstarred=unstarred)
    for element in build.elements:
        if element.kind != "wrapped" and _can_be_wrapped(element):
            yield _wrapped(stack, element)


def _replaced(file: File, build: Build, options: list[str]) -> Change:
    """The attribute becomes a list of blocks behind the statement that gives it something else."""
    statement = next(node for node in file.names.ancestors(build.call) if isinstance(node, ast.stmt))
    attribute = f"{build.function.args.args[0].arg}.{build.path}"
    return insert_behind(statement, f"{attribute} = {{bmt}}.TransformerBlockList({', '.join([attribute, *options])})")


def _can_be_wrapped(element: Element) -> bool:
    return element.kind == "wrapped" or isinstance(element.node, (ast.Call, ast.IfExp))


def _wrapped(stack: Stack, element: Element) -> Change:
    option = "" if stack.use_checkpoint else ", use_checkpoint=False"
    return wrap(element.node, f"{{bmt}}.CheckpointBlock({{it}}{option})")


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
