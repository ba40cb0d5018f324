"""One rank draws the progress bar.

What: ``tqdm(...)`` and ``trange(...)`` get ``disable=bmt.rank() != 0``, and so do the bars of rich and alive_progress.
A bar of tqdm's whose count or text is read, ``while bar.n < steps:``, writes to nowhere on the other ranks instead.
Why: bars of several ranks overwrite each other; a disabled one does not count.
Refuses when: the bar already has ``disable``, or only one rank reaches it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.changes import Arguments, Change, template
from rewriter.rules.imports import imports
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding

_BARS = {"tqdm", "trange"}
_OTHERS = {"rich.progress.track", "rich.progress.Progress", "alive_progress.alive_bar", "alive_progress.alive_it"}
_DRAWN = {"n", "desc", "postfix", "format_dict", "start_t", "last_print_n", "last_print_t", "unit"}
"""What a disabled bar of tqdm does not keep."""
_HINTS = (b"tqdm", b"trange", b"rich", b"alive_")


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or not any(hint in file.source.data for hint in _HINTS):
        return
    for node in file.calls:
        name = facts.project.external(file, node.func)
        if name not in _OTHERS and (not name.startswith("tqdm") or name.split(".")[-1] not in _BARS):
            continue
        if any(keyword.arg in {"disable", None} for keyword in node.keywords):
            continue
        if facts.scripts.in_kept_guard(file, node):
            continue
        changes: tuple[Change, ...] = (Arguments(node, added=(template("disable={bmt}.rank() != 0"),)),)
        if name.startswith("tqdm") and _is_read(file, node):
            if any(keyword.arg == "file" for keyword in node.keywords):
                continue
            drawn = template('file=None if {bmt}.rank() == 0 else open(os.devnull, "w")')
            changes = *imports(file, "os"), Arguments(node, added=(drawn,))
        yield Conversion(RULE.code, node.lineno, "one rank draws the progress bar", changes)


def _is_read(file: File, bar: ast.Call) -> bool:
    """Whether something reads what a bar has only while it is drawn."""
    parent = file.names.parents[bar]
    targets: list[ast.expr] = []
    if isinstance(parent, ast.Assign):
        targets = parent.targets
    elif isinstance(parent, (ast.AnnAssign, ast.NamedExpr)):
        targets = [parent.target]
    elif isinstance(parent, ast.withitem) and parent.optional_vars is not None:
        targets = [parent.optional_vars]
    held = {dotted(target) for target in targets} - {None}
    return bool(held) and any(
        isinstance(node, ast.Attribute)
        and node.attr in _DRAWN
        and isinstance(node.ctx, ast.Load)
        and dotted(node.value) in held
        for node in file.nodes
    )


RULE = Rule(
    code="BMT028",
    title="one rank draws the progress bar",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nimport bmtrain as bmt\nfrom tqdm import tqdm\n\n"
            "bmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "for x in tqdm(batches):\n    optim_manager.backward(model(x).mean())\n",
            "import torch\nimport bmtrain as bmt\nfrom tqdm import tqdm\n\n"
            "bmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "for x in tqdm(batches, disable=bmt.rank() != 0):\n    optim_manager.backward(model(x).mean())\n",
        ),
    ),
)
