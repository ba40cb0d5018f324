"""What cannot work on shards is refused or reported.

What: optimizers that run the model themselves or look into its layers (KFAC, Sophia), and models that the script
captures as a CUDA graph, stop its conversion; under a test that does not hold by default (``if args.kfac:``) an error
says so there. Embeddings that are resized, batch norms (also those by hand), losses that are sums over the batch, or
may be, compare its items with each other or take a root or a norm of its mean, samples that are paired with others of
the batch (mixup and cutmix by ``x.flip(0)``, ``x[index]`` or halves), models that look at the padding of a batch,
losses that are a mean over it, hooks that clamp gradients, and modules that pickle themselves are reported.
Why: a rank holds only its share of every parameter and sees only its share of a batch.
Refuses when: always, but for what stands under a test.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, is_backward, walk
from rewriter.analyze.training.completed import completing
from rewriter.analyze.training.sums import is_size
from rewriter.rules.asked_for import raised_instead, under_test
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark

_NORMALISES = re.compile(
    r"torch\.nn\.BatchNorm|torchvision\.models\.(?:__dict__$|(?:\w+\.)?(?:resne|wide_resnet|densenet|mobilenet|mnasnet|"
    r"efficientnet|inception|googlenet|shufflenet|regnet|vgg\d+_bn))"
)
_RUNS_MODEL = re.compile(r"^(?:E?KFAC\w*|Sophia(?!G$)\w*)$")

_FILLING = {
    "masked_fill", "masked_fill_", "full_like", "full", "new_full", "where", "fill_", "pad_sequence", "pad",
}  # fmt: skip
_ENTROPIES = {
    "torch.nn.functional.cross_entropy", "torch.nn.functional.nll_loss", "torch.nn.CrossEntropyLoss",
    "torch.nn.NLLLoss",
}  # fmt: skip
_WITHOUT_GRADIENTS = {"torch.no_grad", "torch.inference_mode"}
_PADDED = (
    "each batch is padded to its longest here, a rank's share of it less, and {name} looks at the padding ({where}): "
    "mask it (pack it for a recurrent layer), or pad to one length"
)
_PAIRED = (
    "samples of a batch are paired with each other: a rank pairs those of its share only. To pair as one process does, "
    "move the batch of all ranks and keep this rank's share, as bmt.shard_batch(bmt.gather_batch(x).flip(0))"
)
_AVERAGED = (
    "each batch is padded to its longest, a rank's share of it less, and this mean is taken over the padding as well: "
    "leave it out (ignore_index, or a mask with the sum of each item), or pad to one length"
)
_CAPTURING = {"torch.cuda.graph", "torch.cuda.graphs.graph"}
_GRAPHED = {"torch.cuda.make_graphed_callables", "torch.cuda.graphs.make_graphed_callables"}
_CAPTURED = (
    "a CUDA graph of the script's own cannot hold what ranks decide and exchange in a step: take the capture out, and "
    "launch with BMTRAIN_GRAPHS=1, by which blocks run as CUDA graphs of bmtrain's"
)
_MIXERS = re.compile(
    r"torchvision\.transforms\.v2\.(?:MixUp|CutMix)$|timm\.data\.(?:mixup\.)?(?:Mixup|FastCollateMixup)$"
)
_LABELS = re.compile(r"label|target|ground_truth|^gt$", re.I)


_PICKLED = (
    "{name} pickles itself ({by}), which a model whose values are spread over ranks cannot: take that away here, and "
    "save what state_dict() gives"
)
_PICKLING = {"__reduce__", "__reduce_ex__"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if facts.scripts.training:
        yield from _pickles_itself(file, facts)
    if file not in facts.scripts.training:
        return
    yield from _batch_norm(file, facts)
    for call in file.calls:
        if (
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "resize_token_embeddings"
            and not _is_wrapped_later(file, facts, call, call.func.value)
        ):
            message = "embeddings that are sharded keep their size: resize them before the model is given to bmtrain"
            yield Remark(RULE.code, call.lineno, message)
        name = (dotted(call.func) or "").split(".")[-1]
        if _RUNS_MODEL.match(name) and (call.args or call.keywords):
            message = f"{name} runs the model itself, or looks into its layers, and a rank holds only its share of them"
            changes = raised_instead(file, call, f"{message}: choose another optimizer")
            if changes:
                said = f"{message}: where it is asked for, an error says so"
                yield Conversion(RULE.code, call.lineno, said, changes)
            else:
                yield Refusal(RULE.code, call.lineno, message)
        if _captures(file, facts, call):
            if under_test(file, call):
                yield Remark(
                    RULE.code, call.lineno, f"{_CAPTURED}; an error says so where it is asked for", differs=True
                )
            else:
                yield Refusal(RULE.code, call.lineno, _CAPTURED)
    if facts.scripts.shares_data(file) and not facts.scripts.was_parallel(file):
        yield from _whole_batch(file, facts)
    if not facts.scripts.started and not facts.scripts.was_parallel(file):
        for call, module, place in facts.padded.seen(file):
            where = f"{module.file.path.name}:{getattr(place, 'lineno', 0)}"
            yield Remark(RULE.code, call.lineno, _PADDED.format(name=module.name, where=where), differs=True)


def _captures(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call has the model, or its backward, captured as a CUDA graph."""
    name, roles = facts.project.external(file, call.func), facts.scripts.roles[file]
    if name in _GRAPHED:
        return any(
            isinstance(item, ast.expr) and roles.is_model(item) for given in call.args[:1] for item in walk(given)
        )
    block = file.names.parents[call]
    if name not in _CAPTURING or not isinstance(block, ast.withitem):
        return False
    body = file.names.statement_of(call)
    return any(is_backward(item) or (isinstance(item, ast.Call) and roles.is_model(item.func)) for item in walk(body))


def _is_wrapped_later(file: File, facts: Facts, call: ast.Call, model: ast.expr) -> bool:
    """Whether the model is wrapped behind a call that resizes it."""
    roles = facts.scripts.roles[file]
    variable = roles.var(model)
    return variable is not None and any(
        call in walk(last) or last.lineno > call.lineno
        for other, _, statement, _ in roles.assignments
        if other == variable
        and statement.lineno < call.lineno
        and (last := completing(file, facts.project, roles, variable, statement)) is not None
    )


def _pickles_itself(file: File, facts: Facts) -> Iterator[Remark]:
    """Modules with a ``__reduce__`` of their own, or that a decorator of the project gives one."""
    for info in facts.classes.all(file):
        if not facts.classes.is_module(info):
            continue
        own = _PICKLING & info.methods.keys()
        by = next(iter(sorted(own)), "")
        for decorator in info.node.decorator_list:
            called = facts.project.resolve(file, decorator.func if isinstance(decorator, ast.Call) else decorator)
            inside = walk(called.node) if isinstance(called, FunctionInfo) else ()
            if any(isinstance(node, ast.FunctionDef) and node.name in _PICKLING for node in inside):
                by = f"@{file.source.code(decorator)}"
        if by:
            yield Remark(RULE.code, info.node.lineno, _PICKLED.format(name=info.node.name, by=by), differs=True)


def _batch_norm(file: File, facts: Facts) -> Iterator[Finding]:
    """The first batch norm of a file: its statistics are those of a rank's share of the batch."""
    if b"BatchNorm" not in file.source.data and b"torchvision" not in file.source.data:
        return
    for call in file.calls:
        chosen = call.func.value if isinstance(call.func, ast.Subscript) else call.func
        if _NORMALISES.match(facts.project.external(file, chosen)):
            message = "batch norm sees a rank's share of the batch, not the whole batch"
            yield Remark(RULE.code, call.lineno, message)
            return


def _whole_batch(file: File, facts: Facts) -> Iterator[Finding]:
    """Losses that are another value on a share of the batch: sums over it, and items compared with each other."""
    across = facts.scripts.across(file)
    compared = {node.lineno for node in across.compared()}
    ratios = {node.lineno for node in across.ratios()}
    curved = {node.lineno for node in across.curved()} - compared - ratios
    left_out = {node.lineno for node in _left_out(file)} if not _counts_labels(facts) else set()
    counted = {node.lineno for node in across.weighed()} - ratios | left_out
    counted_sums, mixed = across.counted_sums(), set[int]()
    for call in file.calls:
        name = facts.project.external(file, call.func)
        given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        summed = _is_sum(call) or given.get("reduction") == "sum"
        if (
            call in facts.scripts.summed | facts.scripts.divided | counted_sums
            or _is_divided(file, call)
            or _only_evaluates(file, facts, call)
        ):
            continue
        elif summed and (name.startswith("torch.nn.") or _is_sum(call)):
            message = "the loss is a sum over a rank's share of the batch: times bmt.world_size() it is the script's"
            yield Remark(RULE.code, call.lineno, message, differs=True)
        elif name == "torch.arange" and len(call.args) == 1 and _numbers_batch(file, call):
            compared.add(call.lineno)
        elif _MIXERS.match(name):
            mixed.add(call.lineno)
    for call in facts.scripts.adding_items(file):
        message = (
            "the loss adds up what may be the items of the batch, of which a rank has a share: if it does, times "
            "bmt.world_size() it is the script's; a mean of them is the same on any number of ranks"
        )
        yield Remark(RULE.code, call.lineno, message, differs=True)
    for line in sorted(counted):
        message = (
            "the mean over what counts is taken over each rank's share, and the ranks count alike: divide by "
            "bmt.distributed.all_reduce(count.float(), 'avg'), the count of a rank on average"
        )
        if line in left_out:
            message = (
                "the mean over what counts is taken over each rank's share, which may have more labels of -100 than "
                "another's: bmt.loss.mean_over_ranks(F.cross_entropy) counts each label once, and models of "
                "transformers do with num_items_in_batch=bmt.distributed.all_reduce(count.float(), 'avg')"
            )
        yield Remark(RULE.code, line, message, differs=True)
    for line in sorted({node.lineno for node in across.tallied()} - counted):
        message = (
            "classes are weighed by how often they are in a rank's share of the batch: count them on all ranks, "
            "bmt.distributed.all_reduce(counts.float(), 'sum')"
        )
        yield Remark(RULE.code, line, message, differs=True)
    for line in sorted(ratios):
        message = (
            "a quotient of sums over the batch is another one on a rank's share, and the mean of the ranks' is not the "
            "batch's: a quotient for each item, and their mean, is the same on any number of ranks"
        )
        yield Remark(RULE.code, line, message, differs=True)
    for line in sorted(curved - counted):
        message = (
            "a root, power, norm or another function of a mean over the batch is another one on a rank's share: take "
            "it of each item, or of bmt.mean(values), the mean over all ranks"
        )
        yield Remark(RULE.code, line, message, differs=True)
    for call in across.hooked():
        message = (
            "a hook sees the gradient of a rank's share, before the ranks' are averaged: what it clamps or norms is "
            "another. Do it between backward and step, where p.grad is the average"
        )
        yield Remark(RULE.code, call.lineno, message, differs=True)
    for line in sorted(mixed | {node.lineno for node in facts.batch_flow.told(file, "paired")} - compared):
        yield Remark(RULE.code, line, _PAIRED, differs=True)
    for line in sorted({node.lineno for node in facts.batch_flow.told(file, "averaged")} - counted):
        yield Remark(RULE.code, line, _AVERAGED, differs=True)
    for call in next(([node] for node in across.kept()), []):
        message = (
            "statistics of the batch are of a rank's share here, and what is kept of them is each rank's own: give all "
            "ranks the same, bmt.distributed.all_reduce(x.mean(0), 'avg')"
        )
        yield Remark(RULE.code, call.lineno, message)
    for call in across.chosen():
        message = (
            "a batch chooses together here, by what it is on average, and a rank's share may choose otherwise: choose "
            "by the mean over all ranks, bmt.distributed.all_reduce(x.mean(0), 'avg')"
        )
        yield Remark(RULE.code, call.lineno, message, differs=True)
    for node in next(([node] for node in across.mixed() if node.lineno not in compared | ratios | curved), []):
        message = (
            "what a mean over the batch makes meets each item here, and a rank has a share of the batch: take the mean "
            "over all ranks, bmt.distributed.all_reduce(x.mean(0), 'avg')"
        )
        yield Remark(RULE.code, node.lineno, message, differs=True)
    for line in sorted(compared):
        message = "items of a batch are compared with each other: a rank sees its share of them only"
        yield Remark(RULE.code, line, message, differs=True)


def _is_divided(file: File, call: ast.Call) -> bool:
    """Whether a sum is divided by how many there are, on whatever share: it is a mean."""
    match file.names.parents[call]:
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return left is call and is_size(right)
    return False


def _only_evaluates(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether no gradient comes of a call, and all ranks have the whole batch there."""
    if facts.scripts.over_shares(file, call):
        return False
    for parent in file.names.ancestors(call):
        names = [item.context_expr for item in parent.items] if isinstance(parent, ast.With) else []
        names += parent.decorator_list if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) else []
        if any(
            facts.project.external(file, name.func if isinstance(name, ast.Call) else name) in _WITHOUT_GRADIENTS
            for name in names
        ):
            return True
    return False


def _counts_labels(facts: Facts) -> bool:
    """Whether every cross entropy of the scripts is, or becomes, the mean over what counts on all ranks."""
    found = False
    for file in facts.scripts.training:
        for node in file.nodes:
            if isinstance(node, ast.Attribute) and node.attr == "loss" and isinstance(node.ctx, ast.Load):
                if dotted(node) != "bmt.loss":
                    return False  # a model's own
        for call in file.calls:
            name = facts.project.external(file, call.func)
            if name.endswith(".mean_over_ranks"):
                found = True
            elif name in _ENTROPIES:
                parent = file.names.parents[call]
                outer = facts.project.external(file, parent.func) if isinstance(parent, ast.Call) else ""
                if not outer.endswith(".mean_over_ranks") and all(k.arg != "ignore_index" for k in call.keywords):
                    return False
                found = True
            elif name.startswith("transformers."):
                return False
    return found


def _left_out(file: File) -> Iterator[ast.expr]:
    """Where labels are made -100, which cross entropy leaves out unless told otherwise."""
    if b"100" not in file.source.data:
        return
    for node in file.nodes:
        match node:
            case ast.Assign(targets=[ast.Subscript()], value=value) if _is_ignored(value):
                yield value
            case ast.Call(func=ast.Attribute(attr=attr) | ast.Name(id=attr)) if attr in _FILLING:
                yield from (a for a in (*node.args, *(k.value for k in node.keywords)) if _is_ignored(a))
            case ast.BinOp(left=ast.List(elts=[only]), op=ast.Mult()) if _is_ignored(only):
                yield only


def _is_ignored(node: ast.expr) -> bool:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=100)):
            return True
    return False


def _is_sum(call: ast.Call) -> bool:
    """``loss.sum().backward()``."""
    match call.func:
        case ast.Attribute(value=ast.Call(func=ast.Attribute(attr="sum"), args=[], keywords=[]), attr="backward"):
            return True
    return False


def _numbers_batch(file: File, call: ast.Call) -> bool:
    """Whether ``torch.arange(len(x))`` becomes labels."""
    statement = file.names.statement_of(call)
    size = file.source.code(call.args[0])
    named = isinstance(statement, ast.Assign) and _LABELS.search(dotted(statement.targets[0]) or "")
    return bool(named) and bool(re.search(r"^len\(|shape\[0\]$|size\(0\)$|batch|^bsz?$|^[bBn]$", size))


RULE = Rule(
    code="BMT091",
    title="what cannot work on shards is refused or reported",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nfrom kfac import KFAC\n\nmodel = torch.nn.Linear(8, 1)\n"
            "optimizer = KFAC(model.parameters())\n"
            "model(x).mean().backward()\noptimizer.step()\n"
        ),
    ),
)
