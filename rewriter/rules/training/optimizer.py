"""AdamW is bmt.optim.AdamOptimizer.

What: ``torch.optim.AdamW(params, ...)`` becomes ``bmt.optim.AdamOptimizer(params, ...)``; torch's default decay of 0.01
is written out; ``fused`` and ``foreach`` go.
Why: it keeps fp32 weights and states as one rank's share and updates them in one pass. Same numbers as AdamW.
Refuses when: the call has ``**options`` that may hold torch's own arguments, or asks for ``amsgrad``, ``maximize``,
``capturable`` or ``differentiable``. Those and the other elementwise optimizers stay torch's; the OptimManager steps
them on shards.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.changes import Arguments, Change, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_KEPT = ("params", "lr", "betas", "eps", "weight_decay")
_DROPPED = {"fused", "foreach"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or b"AdamW" not in file.source.data:
        return
    for node in file.calls:
        if facts.project.external(file, node.func) == "torch.optim.AdamW":
            reason, dropped = _judge(file, node)
            if reason:
                message = f"torch.optim.AdamW stays ({reason}); the manager steps it on shards"
                yield Remark(RULE.code, node.lineno, message)
            else:
                yield Conversion(RULE.code, node.lineno, "AdamW is bmtrain's", tuple(_changes(node, dropped)))


def _judge(file: File, call: ast.Call) -> tuple[str, list[ast.keyword]]:
    dropped = []
    for keyword in call.keywords:
        if keyword.arg is None:
            if not _only_dropped(file, keyword.value):
                return "its **options may hold anything", []
            dropped.append(keyword)
        elif keyword.arg in _DROPPED:
            dropped.append(keyword)
        elif keyword.arg not in _KEPT:
            if not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                return f"it asks for {keyword.arg}", []
            dropped.append(keyword)
    if any(isinstance(argument, ast.Starred) for argument in call.args) or len(call.args) > len(_KEPT):
        return "its arguments are not known", []
    return "", dropped


def _only_dropped(file: File, value: ast.expr) -> bool:
    """Whether a ``**value`` holds nothing but ``fused`` or ``foreach``."""
    if isinstance(value, ast.IfExp):
        return _only_dropped(file, value.body) and _only_dropped(file, value.orelse)
    if isinstance(value, ast.Dict):
        return all(isinstance(key, ast.Constant) and key.value in _DROPPED for key in value.keys)
    if isinstance(value, ast.Call) and dotted(value.func) == "dict":
        return not value.args and all(keyword.arg in _DROPPED for keyword in value.keywords)
    if isinstance(value, ast.Name):
        found = file.names.lookup(value.id, file.names.scope_of(value))
        values = [binding.value for binding in found[1]] if found else []
        return bool(values) and all(isinstance(item, ast.expr) and _only_dropped(file, item) for item in values)
    return False


def _changes(call: ast.Call, dropped: list[ast.keyword]) -> Iterator[Change]:
    yield replace(call.func, "{bmt}.optim.AdamOptimizer")
    given = {keyword.arg for keyword in call.keywords} | set(_KEPT[: len(call.args)])
    added = () if "weight_decay" in given else (template("weight_decay=0.01"),)
    if added or dropped:
        yield Arguments(call, added=added, dropped=tuple(dropped))


RULE = Rule(
    code="BMT021",
    title="AdamW is bmt.optim.AdamOptimizer",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
manager = bmt.optim.OptimManager(loss_scale=None)
manager.add_optimizer(optimizer)
manager.backward(model(torch.ones(1, 4)).sum())
manager.step()
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))
optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3, weight_decay=0.01)
manager = bmt.optim.OptimManager(loss_scale=None)
manager.add_optimizer(optimizer)
manager.backward(model(torch.ones(1, 4)).sum())
manager.step()
""",
        ),
    ),
)
