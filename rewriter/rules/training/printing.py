"""Output comes from one rank.

What: ``print(...)`` becomes ``bmt.print_rank(...)``, and so does ``sys.stdout.write(...)``, without the line's end.
Why: every rank runs the script; without this every line appears once per rank.
Refuses when: only one rank reaches the call already, or what it prints holds the rank's number, or it stands in an
``except`` around training, where one rank may be alone, or in a handler of ``logging``, which gets warnings of all
ranks; ``print`` is not the built-in one; the file is not part of a
training script.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.training.rank_names import is_rank
from rewriter.analyze.training.writers import handles_records
from rewriter.changes import Change, replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or not (b"print" in file.source.data or b"std" in file.source.data):
        return
    for node in file.calls:
        change = _printed(file, facts, node)
        if change is None or facts.scripts.in_kept_guard(file, node):
            continue
        if handles_records(file, facts.project, node):
            continue
        if facts.decisions.caught.in_handler(file, node):
            continue  # of an error that another rank may not know
        if file not in facts.scripts.programs and _under_main(file, node):
            continue
        if any(is_rank(file, item) for argument in node.args for item in walk(argument) if isinstance(item, ast.expr)):
            continue  # each rank says who it is
        yield Conversion(RULE.code, node.lineno, "one rank prints", (change,))


def _printed(file: File, facts: Facts, call: ast.Call) -> Change | None:
    """What becomes of a call that prints."""
    match call:
        case ast.Call(func=ast.Name(id="print")):
            bound = file.names.lookup("print", file.names.scope_of(call))
            return replace(call.func, "{bmt}.print_rank") if bound is None else None
        case ast.Call(args=[ast.expr() as shown], keywords=[]) if isinstance(file.names.parents[call], ast.Expr):
            stream = facts.project.external(file, call.func)
            if stream == "sys.stdout.write" and not isinstance(shown, ast.Starred):
                return replace(call, '{bmt}.print_rank({shown}, end="")', shown=shown)
            if stream == "sys.stderr.write" and isinstance(call.func, ast.Attribute):
                code = '{bmt}.print_rank({shown}, end="", file={stream})'
                return replace(call, code, shown=shown, stream=call.func.value)
    return None


def _under_main(file: File, node: ast.AST) -> bool:
    return any(
        isinstance(parent, ast.If) and "__name__" in ast.dump(parent.test) for parent in file.names.ancestors(node)
    )


RULE = Rule(
    code="BMT027",
    title="output comes from one rank",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nimport bmtrain as bmt\n\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\noptim_manager.backward(model(x).mean())\n"
            'print("done", flush=True)\n',
            "import torch\nimport bmtrain as bmt\n\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\noptim_manager.backward(model(x).mean())\n"
            'bmt.print_rank("done", flush=True)\n',
        ),
    ),
)
