"""Layers of blocks are split over tensor-parallel ranks.

What: with ``--tensor-parallel`` the constructor of the outermost model ends with ``bmt.parallelize_module(self,
{...})``, a plan in the form of ``torch.distributed.tensor.parallel``: by name, which linear layers of the blocks give
each rank its share of their output features ("colwise") and which take such shares and add up what the ranks make of
them ("rowwise"). Views that name the number of heads, or of all features, get -1 in its place, and
``qkv.split(width)`` of equal parts becomes ``qkv.chunk(3)``: the same on one rank, and right on one that has its share.
Why: attention and feed-forward layers that are too large for one GPU, or too slow, are computed by several at once. How
many is said at the launch, ``BMTRAIN_TP_SIZE=2 torchrun ...``; without it nothing is split.
Refuses when: what stands between two layers is not known to do the same with a share of the features as with all of
them: a norm over all heads, a sum over heads, a whole value that trains, or has an entry for each head, and meets
shares, a comparison of sizes, parts of unequal length; a layer is used twice, elsewhere or inside a loop, shares its
weight, or is no plain ``nn.Linear``; code may change the ``nn.Linear`` layers of the model that is built, or adds up
its parameters, or adapters do. Such layers stay whole, and each is reported, as are all that no plan names: embeddings,
heads, layers in lists and outside of blocks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.forwards import Edit
from rewriter.analyze.model.splits import Block, Plan
from rewriter.analyze.model.unplanned import NOT_SEEN
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.changes import Change, insert_behind, replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if not facts.tensor_parallel:
        return
    if facts.project.partial:
        yield Remark(
            RULE.code, 1, "no layer is split: the project is too large to be read as one; convert its model alone"
        )
        return
    for plan in facts.splits.plans.values():
        if not _is_planned(plan):
            yield from _edits(file, plan)
            if plan.root.file is file:
                yield from _planned(file, plan)
                yield from _outside(plan)
    for left in facts.splits.whole:
        if left.file is file:
            message = f"the layers of {left.stack.name} stay whole: {left.reason}"
            yield Remark(RULE.code, left.line, message)
    for block in {id(block): block for plan in facts.splits.plans.values() for _, block in plan.blocks}.values():
        if block.cls.file is file and not any(_is_planned(p) for p in facts.splits.plans.values()):
            yield from _told(block)


def _is_planned(plan: Plan) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parallelize_module"
        for node in walk(plan.root.methods["__init__"])
    )


def _planned(file: File, plan: Plan) -> Iterator[Finding]:
    if not plan.styles:
        return
    lines = ["{bmt}.parallelize_module(", "    self,", "    {"]
    lines[1] = f"    {plan.root.methods['__init__'].args.args[0].arg},"
    lines += [f'        "{name}": {style},' for name, style in plan.styles.items()]
    heads = ", ".join(name if name.isdecimal() else f'"{name}"' for name in plan.heads)
    lines += ["    },", f"    heads=[{heads}]," if heads else "    divide=[],", ")"]
    files = {edit.file: None for _, block in plan.blocks for edit in block.edits}
    message = f"{plan.root.name} splits {len(plan.styles)} kinds of layers over tensor-parallel ranks: " + "; ".join(
        f"of {stack.name} {', '.join(block.styles)}" for stack, block in plan.blocks if block.styles
    )
    requires = tuple(_key(plan, other) for other in files)
    yield Conversion(
        RULE.code, plan.behind.lineno, message, (insert_behind(plan.behind, "\n".join(lines)),), requires=requires
    )


def _edits(file: File, plan: Plan) -> Iterator[Finding]:
    edits = {edit.node: edit for _, block in plan.blocks for edit in block.edits if edit.file is file}
    if edits:
        first = min(edits.values(), key=lambda edit: edit.node.lineno)
        message = f"views go by the share of a rank ({len(edits)} places)"
        changes: tuple[Change, ...] = tuple(map(_changed, edits.values()))
        yield Conversion(RULE.code, first.node.lineno, message, changes, key=_key(plan, file))


def _changed(edit: Edit) -> Change:
    if "{value}" in edit.text:
        assert isinstance(edit.node, ast.Attribute)
        return replace(edit.node, edit.text, value=edit.node.value)
    return replace(edit.node, edit.text)


def _outside(plan: Plan) -> Iterator[Finding]:
    """What no plan names, as it is outside of the blocks."""
    for kinds, what in _OUTSIDE:
        names = _named(plan.outside, kinds)
        if names and plan.styles:
            message = f"{_stay(names, plan.root.name)}: {what} outside of blocks are not planned"
            yield Remark(RULE.code, plan.root.node.lineno, message)


def _stay(names: Sequence[str], owner: str) -> str:
    return f"{', '.join(names)} of {owner} stay{'s' if len(names) == 1 else ''} whole"


def _named(found: tuple[tuple[str, str], ...], kinds: Sequence[str]) -> list[str]:
    """Those of such kinds; without any, those of kinds that ``_KINDS`` does not know."""
    chosen = (item for item in found if (item[1] in kinds if kinds else item[1] not in _KINDS))
    return list(dict.fromkeys(f"{name} ({kind})" if not kinds else name for name, kind in chosen))


_EMBEDDINGS = ("Embedding", "EmbeddingBag")
_KINDS = (*_EMBEDDINGS, "Linear", NOT_SEEN)
_OUTSIDE: tuple[tuple[Sequence[str], str], ...] = (
    (_EMBEDDINGS, "embeddings"), (("Linear",), "linear layers"), ((NOT_SEEN,), "lists of layers"),
    ((), "other layers"),
)  # fmt: skip
_UNREAD: tuple[tuple[Sequence[str], str], ...] = (
    (("Linear",), "a list or dict holds them, or the forward is not seen to call them by their names"),
    (_EMBEDDINGS, "embeddings inside of blocks are not planned"),
    ((NOT_SEEN,), "what is in these lists is not seen"),
    ((), "only layers of torch.nn.Linear are planned"),
)


def _key(plan: Plan, file: File) -> str:
    return f"{file.place}\0{plan.root.file.place}\0{plan.root.node.lineno}\0shares"


def _told(block: Block) -> Iterator[Finding]:
    """What of a block stays whole, module by module, each with what was found first."""
    told: set[str] = set()
    everything = {name for taken in block.left for name in taken.origins}
    for taken in block.left:
        parents = {name.rpartition(".")[0] for name in taken.origins - told}
        names = sorted(name for name in everything - told if name.rpartition(".")[0] in parents)
        told |= {*names}
        if names:
            at = f" (line {taken.line})" if taken.file is block.cls.file else f" ({taken.file.path.name}:{taken.line})"
            message = f"{_stay(names, block.cls.name)}: {taken.reason}{at}"
            yield Remark(RULE.code, block.cls.node.lineno, message)
    for kinds, reason in _UNREAD:
        unread = _named(block.unread, kinds)
        if unread:
            yield Remark(RULE.code, block.cls.node.lineno, f"{_stay(unread, block.cls.name)}: {reason}")
    if block.assumed and block.styles:
        message = f"what {block.cls.name} gets is taken for (batch, sequence, features): --verify shows whether it is"
        yield Remark(RULE.code, block.cls.node.lineno, message)


_BEFORE = """import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(y.transpose(1, 2).reshape(B, T, C))


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList([Block(64, 4) for _ in range(depth)])

    def forward(self, x, seen):
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return x
"""

_AFTER = """import torch
from torch import nn
from torch.nn import functional as F
import bmtrain as bmt


class Block(bmt.DistributedModule):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, -1, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(y.transpose(1, 2).reshape(B, T, -1))


class Net(bmt.DistributedModule):
    def __init__(self, depth):
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Block(64, 4)) for _ in range(depth)])
        bmt.parallelize_module(
            self,
            {
                "layers.*.qkv": ("packed_colwise", 3),
                "layers.*.proj": "rowwise",
            },
            heads=["heads"],
        )

    def forward(self, x, seen):
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return x
"""

RULE = Rule(
    code="BMT008",
    title="layers of blocks are split over tensor-parallel ranks",
    explanation=__doc__,
    find=find,
    examples=(Example(_BEFORE, _AFTER, tensor_parallel=True),),
)
