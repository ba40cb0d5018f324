"""torch.distributed's calls are bmtrain's.

What: ``get_rank``, ``get_world_size``, ``barrier``, ``is_initialized`` and in-place ``all_reduce`` become bmtrain's;
``init_process_group`` and ``destroy_process_group`` go.
Why: bmtrain has its own communicators and needs no process group.
Refuses when: the project uses other collectives of torch.distributed, or groups: then the process group stays beside
bmtrain's communicators. A script that reduces gradients itself would do it twice.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import Remove, replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark

_SIMPLE = {
    "torch.distributed.get_rank": "rank",
    "torch.distributed.get_world_size": "world_size",
    "torch.distributed.barrier": "synchronize",
    "torch.distributed.is_initialized": "is_initialized",
}
_GROUP = {"torch.distributed.init_process_group", "torch.distributed.destroy_process_group"}
_OPERATIONS = {"SUM": "sum", "AVG": "avg", "MAX": "max", "MIN": "min", "PRODUCT": "prod"}
_HARMLESS = {
    "is_available",
    "is_nccl_available",
    "is_gloo_available",
    "is_torchelastic_launched",
    "is_backend_available",
}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    names = {call: facts.project.external(file, call.func) for call in file.calls}
    for call, name in names.items():
        if name == "torch.distributed.all_reduce" and _is_gradient(call):
            message = "gradients are averaged by hand; bmtrain's are means over the ranks already: take these lines out"
            yield Refusal(RULE.code, call.lineno, message)
    distributed = {call: name for call, name in names.items() if name.startswith("torch.distributed.")}
    others = [call for call, name in distributed.items() if not _known(file, facts, call, name)]
    for call in others:
        yield Remark(RULE.code, call.lineno, f"{names[call]} keeps using torch's process group")
    for call, name in distributed.items():
        if call not in others and not (others and name in _GROUP):
            yield from _call(file, facts, call, name)


def _is_gradient(call: ast.Call) -> bool:
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(node, ast.Attribute) and node.attr == "grad" for a in arguments for node in ast.walk(a))


def _known(file: File, facts: Facts, call: ast.Call, name: str) -> bool:
    if name in _GROUP or name.split(".")[-1] in _HARMLESS or name.count(".") > 2:
        return True
    if name in _SIMPLE:
        return not call.args and all(keyword.arg == "device_ids" for keyword in call.keywords)
    if name == "torch.distributed.broadcast":
        return _from_rank(file, call) is not None
    return name == "torch.distributed.all_reduce" and _operation(file, facts, call) is not None


def _from_rank(file: File, call: ast.Call) -> tuple[ast.expr, ast.expr] | None:
    """The tensor and the source of a broadcast that is a statement of its own, without a group."""
    statement = file.names.statement_of(call)
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    values.update(zip(("tensor", "src"), call.args, strict=False))
    if not isinstance(statement, ast.Expr) or statement.value is not call or set(values) != {"tensor", "src"}:
        return None
    return values["tensor"], values["src"]


def _operation(file: File, facts: Facts, call: ast.Call) -> str | None:
    """bmtrain's name of an all_reduce's operation, if the call is a statement of its own without a group."""
    statement = file.names.statement_of(call)
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    values.update(zip(("tensor", "op"), call.args, strict=False))
    if not isinstance(statement, ast.Expr) or statement.value is not call or set(values) - {"tensor", "op"}:
        return None
    if "op" not in values:
        return "sum"
    return _OPERATIONS.get(facts.project.external(file, values["op"]).split(".")[-1])


def _call(file: File, facts: Facts, call: ast.Call, name: str) -> Iterator[Finding]:
    if name in _SIMPLE:
        message = f"{name} is {facts.alias(file)}.{_SIMPLE[name]}"
        yield Conversion(RULE.code, call.lineno, message, (replace(call, f"{{bmt}}.{_SIMPLE[name]}()"),))
    elif name in _GROUP:
        statement = file.names.statement_of(call)
        if isinstance(statement, ast.Expr) and statement.value is call:
            yield Conversion(RULE.code, call.lineno, "bmtrain needs no process group", (Remove(statement),))
    elif name == "torch.distributed.broadcast":
        found = _from_rank(file, call)
        assert found is not None
        code = "{tensor}.copy_({bmt}.distributed.broadcast({tensor}, {root}))"
        change = replace(call, code, tensor=found[0], root=found[1])
        yield Conversion(RULE.code, call.lineno, "the broadcast is bmtrain's", (change,))
    elif name == "torch.distributed.all_reduce":
        tensor = call.args[0] if call.args else call.keywords[0].value
        reduction = f'{{bmt}}.distributed.all_reduce({{tensor}}, op="{_operation(file, facts, call)}")'
        change = replace(call, f"{{tensor}}.copy_({reduction})", tensor=tensor)
        yield Conversion(RULE.code, call.lineno, "the reduction is bmtrain's", (change,))


RULE = Rule(
    code="BMT030",
    title="torch.distributed's calls are bmtrain's",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import torch.distributed as dist
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
count = torch.ones(1) * dist.get_rank()
dist.all_reduce(count)
dist.barrier()
dist.destroy_process_group()
""",
            """import torch
import torch.distributed as dist
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
count = torch.ones(1) * bmt.rank()
count.copy_(bmt.distributed.all_reduce(count, op="sum"))
bmt.synchronize()
""",
        ),
        Example(
            """import torch
import torch.distributed as dist

dist.init_process_group("nccl")
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(x).mean().backward()
for parameter in model.parameters():
    dist.all_reduce(parameter.grad)
optimizer.step()
""",
        ),
    ),
)
