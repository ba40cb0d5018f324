"""DistributedDataParallel goes away.

What: ``model = DDP(model, ...)`` is removed, as is DataParallel, ``model.module`` is ``model`` (in
other files, too), ``no_sync()`` is a null context, a DistributedSampler is told rank and number of ranks.
Why: a converted model reduces its gradients itself. The sampler still gives every rank its share.
Refuses when: SyncBatchNorm is asked for; it needs a process group. Text like ``"module.encoder"``, which no name in a
checkpoint begins with any more, is reported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.analyze.read.nodes import dotted, same
from rewriter.analyze.training.scripts import DATA_PARALLEL
from rewriter.analyze.training.told_ranks import is_of_a_gpu
from rewriter.changes import Arguments, Change, Remove, replace, template
from rewriter.rules.imports import imports
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_WRAPPED = re.compile(r"module\.[A-Za-z_][\w.]*$")
_UNNAMED = 'no wrapper puts "module." before the names in checkpoints that are written now: {} is not found in them'
_AVERAGES = {"AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3", "ModelEMA"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    yield from _names(file, facts)
    if file not in facts.scripts.training:
        return
    for node in file.nodes:
        if isinstance(node, ast.Call):
            yield from _call(file, facts, node)
        elif isinstance(node, ast.Attribute) and node.attr in {"module", "_orig_mod"}:
            yield from _module(file, facts, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            if node.targets[0].attr == "require_backward_grad_sync":
                message = "gradients need no switch for their reduction"
                yield Conversion(RULE.code, node.lineno, message, (Remove(node),))


def _names(file: File, facts: Facts) -> Iterator[Remark]:
    """Code that looks for the names which a wrapper's parameters have in checkpoints: ``"module.encoder"``."""
    lines = set[int]()
    for node in file.nodes if facts.scripts.wraps and b"module." in file.source.data else ():
        match node:
            case ast.Constant(value=str(text)) if _WRAPPED.match(text) and node.lineno not in lines:
                lines.add(node.lineno)
                yield Remark(RULE.code, node.lineno, _UNNAMED.format(file.source.code(node)), differs=True)


def _call(file: File, facts: Facts, node: ast.Call) -> Iterator[Finding]:
    changes: tuple[Change, ...]
    name = facts.project.external(file, node.func)
    if name in DATA_PARALLEL and node.args:
        statement = file.names.statement_of(node)
        if isinstance(statement, ast.Assign) and statement.value is node and _same_code(file, statement, node.args[0]):
            changes = (Remove(statement),)
        else:
            changes = (replace(node, "{model}", model=node.args[0]),)
        yield Conversion(RULE.code, node.lineno, "the model needs no wrapper", changes)
    elif name == "torch.utils.data.DistributedSampler":
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        given.update(zip(("dataset", "num_replicas", "rank"), node.args, strict=False))
        options = {"num_replicas": "world_size", "rank": "rank"}
        added = tuple(template(f"{key}={{bmt}}.{what}()") for key, what in options.items() if key not in given)
        if added and (node.args or node.keywords):
            change = Arguments(node, added=added)
            yield Conversion(RULE.code, node.lineno, "the sampler is told the ranks", (change,))
        if "rank" in given and is_of_a_gpu(file, facts.scripts, given["rank"]):
            changes = (replace(given["rank"], "{bmt}.rank()"),)
            yield Conversion(RULE.code, node.lineno, "the sampler is told the ranks", changes)
    elif name == "torch.nn.SyncBatchNorm.convert_sync_batchnorm":
        yield Remark(RULE.code, node.lineno, "SyncBatchNorm needs a process group")
    elif isinstance(node.func, ast.Attribute) and node.func.attr == "no_sync" and not node.args:
        if facts.scripts.roles[file].is_model(node.func.value):
            changes = (replace(node, "contextlib.nullcontext()"), *imports(file, "contextlib"))
            yield Conversion(RULE.code, node.lineno, "gradients are reduced once a step in any case", changes)


def _same_code(file: File, statement: ast.Assign, value: ast.expr) -> bool:
    target = statement.targets[0]
    return len(statement.targets) == 1 and file.source.code(target) == file.source.code(value)


def _module(file: File, facts: Facts, node: ast.Attribute) -> Iterator[Finding]:
    """``model.module`` is the model itself."""
    roles = facts.scripts.roles[file]
    parent = file.names.parents[node]
    if not isinstance(node.ctx, ast.Load) or _keeps_another(file, facts, node.value):
        return
    if node.attr == "module" and not facts.scripts.is_parallel(file) and not facts.scripts.was_wrapped(file):
        return
    if not roles.is_model(node.value) and not (node.attr == "module" and _is_asked_as_model(file, facts, node, parent)):
        return
    place: ast.expr = node
    if isinstance(parent, ast.IfExp) and (same(parent.orelse, node.value) or same(parent.body, node.value)):
        place = parent
    change = replace(place, "{model}", model=node.value)
    yield Conversion(RULE.code, node.lineno, "the model is not wrapped", (change,))


def _keeps_another(file: File, facts: Facts, node: ast.expr) -> bool:
    """Whether an object is of a class that has a ``module`` of its own, as averages of weights do."""
    roles = facts.scripts.roles[file]
    variables = {variable} if (variable := roles.var(node)) is not None else set()
    variables |= {given for argument, given in roles.handed_on if argument in variables}
    for assigned, value, *_ in roles.assignments:
        if assigned in variables and isinstance(value, ast.Call):
            found = facts.project.resolve(file, value.func)
            if isinstance(found, ClassInfo) and facts.scripts.holds_module(found):
                return True
            if isinstance(found, External) and found.name.split(".")[-1] in _AVERAGES:
                return True
    return False


def _is_asked_as_model(file: File, facts: Facts, node: ast.Attribute, parent: ast.AST) -> bool:
    """Whether what is asked of ``x.module`` is a model's, where ``x`` is not known and no class has a ``module``."""
    asked = parent.attr if isinstance(parent, ast.Attribute) else "forward" if _is_called(parent, node) else ""
    if dotted(node.value) == "self" or facts.project.resolve(file, node.value) is not None:
        return False
    return facts.scripts.is_of_models(asked) and not facts.scripts.any_holds_module


def _is_called(parent: ast.AST, node: ast.expr) -> bool:
    return isinstance(parent, ast.Call) and parent.func is node


RULE = Rule(
    code="BMT029",
    title="DistributedDataParallel goes away",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt
from torch.nn.parallel import DistributedDataParallel as DDP

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
model = DDP(model)
raw_model = model.module
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
""",
            """import torch
import bmtrain as bmt
from torch.nn.parallel import DistributedDataParallel as DDP

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
raw_model = model
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
""",
        ),
    ),
)
