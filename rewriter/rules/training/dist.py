"""torch.distributed's calls are bmtrain's.

What: ``get_rank``, ``get_world_size``, ``barrier``, ``is_initialized`` and in-place ``all_reduce`` become bmtrain's;
``init_process_group`` and ``destroy_process_group`` go; where the script told the process group a rank and a number of
ranks and reads them elsewhere, these are what the launcher says: ``args.rank, args.world_size = ...``.
Why: bmtrain has its own communicators and needs no process group.
Refuses when: the project uses other collectives of torch.distributed, or groups: these stay, and the script registers
torch's process group behind ``bmt.init_distributed()``. A script that reduces gradients itself would do it twice.
Where a flag of the user's decides whether a script joins the others (``if args.distributed:``), which torchrun does not
set, it is reported: without it every rank takes itself for the only one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.training.told_ranks import names_to_set, tellings
from rewriter.analyze.training.torch_distributed import GROUP, SIMPLE, calls_that_stay, from_rank, operation
from rewriter.changes import Insert, Remove, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark

_REDUCING = {
    "torch.distributed.all_reduce", "torch.distributed.reduce", "torch.distributed.all_reduce_coalesced",
}  # fmt: skip
_DEEP = 4
_PARTS = (ast.expr, ast.comprehension, ast.keyword)
_NUMBERS = {
    "norm",
    "vector_norm",
    "sum",
    "mean",
    "max",
    "min",
    "isnan",
    "isfinite",
    "isinf",
    "any",
    "all",
    "item",
    "dot",
}
"""What makes numbers of gradients, which scripts may show."""


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    names = {call: facts.project.external(file, call.func) for call in file.calls}
    for call, name in names.items():
        if name in _REDUCING and any(_is_gradient(file, item) for item in _given(call)):
            message = "gradients are averaged by hand; bmtrain's are means over the ranks already: take these lines out"
            if facts.scripts.trains(file):
                yield Refusal(RULE.code, call.lineno, message)
            else:
                yield Remark(RULE.code, call.lineno, f"{message}, where they are called", differs=True)
    distributed = {call: name for call, name in names.items() if name.startswith("torch.distributed.")}
    others = calls_that_stay(file, facts.project)
    registered = any(file in facts.scripts.reach(program) for program in facts.scripts.programs)
    for test in facts.several_ranks.unanswered(file):
        message = (
            f"{file.source.code(test)} decides whether ranks share the work: without, each does all of it as rank 0"
        )
        yield Remark(RULE.code, test.lineno, message, differs=True)
    for call in others if not registered else ():
        yield Remark(RULE.code, call.lineno, f"{names[call]} keeps using torch's process group", differs=True)
    if registered or not others:
        yield from _numbers(file, facts)
    for call, name in distributed.items():
        if call not in others and (registered or not (others and name in GROUP)):
            yield from _call(file, facts, call, name)


def _given(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _is_gradient(file: File, value: ast.AST, deep: int = 0) -> bool:
    """Whether a value is made of gradients: ``p.grad``, or a flat tensor of a list of them."""
    if isinstance(value, ast.Call) and (dotted(value.func) or _attr(value.func)).split(".")[-1] in _NUMBERS:
        return False
    if isinstance(value, ast.Attribute) and value.attr == "grad":
        return True
    if isinstance(value, ast.Name) and deep < _DEEP:
        held = [*file.names.values_of(value), *_appended(file, value)]
        return any(_is_gradient(file, part, deep + 1) for part in held if part is not value)
    return any(_is_gradient(file, part, deep) for part in ast.iter_child_nodes(value) if isinstance(part, _PARTS))


def _attr(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ""


def _appended(file: File, name: ast.Name) -> Iterator[ast.expr]:
    """What is put into a list: ``grads.append(p.grad.data)``."""
    function = file.names.function_of(name)
    for call in file.calls:
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=held), attr="append" | "extend"), args=[given]):
                if held == name.id and file.names.function_of(call) is function:
                    yield given


def _call(file: File, facts: Facts, call: ast.Call, name: str) -> Iterator[Finding]:
    if name in SIMPLE:
        message = f"{name} is {facts.alias(file)}.{SIMPLE[name]}"
        yield Conversion(RULE.code, call.lineno, message, (replace(call, f"{{bmt}}.{SIMPLE[name]}()"),))
    elif name in GROUP:
        statement = file.names.statement_of(call)
        if isinstance(statement, ast.Expr) and statement.value is call:
            yield Conversion(RULE.code, call.lineno, "bmtrain needs no process group", (Remove(statement),))
    elif name == "torch.distributed.broadcast":
        found = from_rank(file, call)
        assert found is not None
        code = "{tensor}.copy_({bmt}.distributed.broadcast({tensor}, {root}))"
        change = replace(call, code, tensor=found[0], root=found[1])
        yield Conversion(RULE.code, call.lineno, "the broadcast is bmtrain's", (change,))
    elif name == "torch.distributed.all_reduce":
        tensor = call.args[0] if call.args else call.keywords[0].value
        reduction = f'{{bmt}}.distributed.all_reduce({{tensor}}, op="{operation(file, facts.project, call)}")'
        change = replace(call, f"{{tensor}}.copy_({reduction})", tensor=tensor)
        yield Conversion(RULE.code, call.lineno, "the reduction is bmtrain's", (change,))


def _numbers(file: File, facts: Facts) -> Iterator[Finding]:
    """What the process group is told, by whatever names, are the launcher's numbers."""
    for call, told in tellings(file, facts.scripts):
        names = names_to_set(file, facts.scripts, call, told)
        statement = file.names.statement_of(call)
        if not names or not isinstance(statement, ast.Expr) or statement.value is not call:
            continue
        targets = ", ".join(f"{{{what}}}" for what in names)
        values = ", ".join(f"{{bmt}}.{what}()" for what in names)
        line = template(f"{targets} = {values}", **names)
        message = f"{' and '.join(map(file.source.code, names.values()))} as the launcher counts"
        yield Conversion(RULE.code, call.lineno, message, (Insert(statement, (line,), behind=True),))


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
