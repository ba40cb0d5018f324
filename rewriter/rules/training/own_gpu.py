"""A script that names its GPU by a number names its rank's.

What: ``import bmtrain.own_gpu`` becomes the first line of a script which names a GPU (``torch.device("cuda:0")``,
``.cuda(args.gpu)``, ``torch.cuda.set_device(0)``), itself or in a file that it imports, or leaves the name to settings
(``config["device"]``) and says "cuda" nowhere.
Each rank then sees one GPU, its own, as ``cuda:0``. Where all places say another number, ``"cuda:3"`` becomes
``"cuda:0"``.
Why: every rank of a host has another GPU. Named by one number, batches of all ranks would go to the same GPU, and
torch ends the first forward on the others, as their models are not there.
Refuses when: the program knows of ranks by itself (DistributedDataParallel, LOCAL_RANK, processes that it starts, a
name made of a rank), for it names its GPU by them. Places that name several GPUs are reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import insert_before, replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_LINE = "import bmtrain.own_gpu  # a rank sees one GPU, as cuda:0"


def find(file: File, facts: Facts) -> Iterator[Finding]:
    names = facts.gpu_names
    if file in facts.scripts.programs and names.are_shared(file):
        first = _first(file)
        line = next((name.node.lineno for name in names.of(file)), first.lineno)
        yield Conversion(RULE.code, line, "the GPU that is named is each rank's own", (insert_before(first, _LINE),))
    if file not in facts.scripts.training or not names.of(file):
        return
    numbers = names.numbers(file)
    if len(numbers) > 1:
        put = (name for name in names.of(file) if not name.asks)
        other = next((name for name in put if name.number not in {None, min(numbers)}), None)
        if other is not None:
            message = f"a rank has one GPU, cuda:0, and this names another: put what is on {_listed(numbers)} on one"
            yield Remark(RULE.code, other.node.lineno, message, differs=True)
    elif numbers and numbers != {0}:
        for name in names.of(file):
            if name.number is not None and file.source.is_exact(name.node):
                assert isinstance(name.node, ast.Constant)
                by = '"cuda:0"' if isinstance(name.node.value, str) else "0"
                message = "a rank's one GPU is cuda:0"
                yield Conversion(RULE.code, name.node.lineno, message, (replace(name.node, by),))


def _first(file: File) -> ast.stmt:
    """The first statement in front of which code may stand."""
    body = file.tree.body
    start = 1 if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else 0
    while isinstance(held := body[start], ast.ImportFrom) and held.module == "__future__":
        start += 1
    return body[start]


def _listed(numbers: set[int]) -> str:
    *first, last = (f"GPU {number}" if at == 0 else str(number) for at, number in enumerate(sorted(numbers)))
    return f"{', '.join(first)} and {last}"


RULE = Rule(
    code="BMT048",
    title="a script that names its GPU names its rank's",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torch import nn

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = nn.Linear(4, 4).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 4, device=device)).sum().backward()
optimizer.step()
""",
            """import bmtrain.own_gpu  # a rank sees one GPU, as cuda:0
import torch
from torch import nn
import bmtrain as bmt

bmt.init_distributed(seed=0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = bmt.BMTrainModelWrapper(nn.Linear(4, 4).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
optim_manager.backward(model(torch.ones(1, 4, device=device)).sum())
optim_manager.step()
""",
        ),
    ),
)
