"""One rank makes the writer of a log.

What: ``SummaryWriter(...)`` of TensorBoard, ``mlflow.start_run()`` and their like become
``bmt.on_rank_0(SummaryWriter)(...)``, which gives an object that does nothing on the other ranks, wherever it is handed
on. ``wandb.init(...)`` is told ``mode="disabled"`` there.
Where all ranks then look into its folder, or change to it, they wait for it: ``bmt.synchronize()`` behind it.
Why: a writer of each rank writes the same log once more, and making their folder is a race that stops a rank.
Refuses when: only one rank reaches the call. A class of the project that is such a writer and has methods for all ranks
is reported, and so are values that a writer makes up (``wandb.run.id``, ``writer.log_dir`` where it was given none),
which are rank 0's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.training.writers import CAN_BE_DISABLED, MADE_ONCE
from rewriter.changes import Arguments, template, wrap
from rewriter.rules.rule import Example, Rule
from rewriter.rules.waits import waits
from rewriter.types import Conversion, Finding, Remark

_HINTS = (
    b"Writer", b"wandb", b"swanlab", b"aim", b"comet", b"mlflow", b"neptune", b"clearml", b"visdom", b"dvclive",
    b"trackio",
)  # fmt: skip
_VALUES = {"log_dir", "logdir", "get_logdir"}
_OF_A_RUN = {"id", "name", "dir", "path", "url", "project"}
_MESSAGE = "one rank makes this writer"


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or not any(hint in file.source.data for hint in _HINTS):
        return
    for call in file.calls:
        if facts.scripts.in_kept_guard(file, call):
            continue
        name = facts.project.external(file, call.func)
        if name in CAN_BE_DISABLED and all(keyword.arg is not None for keyword in call.keywords):
            yield from _disabled(call)
        elif name in MADE_ONCE | CAN_BE_DISABLED:
            yield _made_once(call)
            yield from waits(RULE.code, file, facts, (call,))
        elif (cls := _own_writer(file, facts, call)) is not None:
            if any(facts.scripts.collectives.function(cls.file, method) for method in cls.methods.values()):
                message = f"every rank makes a {cls.name}, whose methods are for all ranks: one rank is to write"
                yield Remark(RULE.code, call.lineno, message, differs=True)
            else:
                yield _made_once(call)
    yield from _values(file, facts)


def _made_once(call: ast.Call) -> Conversion:
    return Conversion(RULE.code, call.lineno, _MESSAGE, (wrap(call.func, "{bmt}.on_rank_0({it})"),))


def _disabled(call: ast.Call) -> Iterator[Finding]:
    mode = next((keyword.value for keyword in call.keywords if keyword.arg == "mode"), None)
    if mode is not None and any(isinstance(n, ast.Constant) and n.value == "disabled" for n in ast.walk(mode)):
        return
    own = '{it} if {bmt}.rank() == 0 else "disabled"'
    added = Arguments(call, added=(template('mode=None if {bmt}.rank() == 0 else "disabled"'),))
    yield Conversion(RULE.code, call.lineno, _MESSAGE, (added if mode is None else wrap(mode, own),))


def _own_writer(file: File, facts: Facts, call: ast.Call) -> ClassInfo | None:
    """The class of the project that a call makes an object of, where it is derived from such a writer."""
    found = facts.project.resolve(file, call.func)
    if not isinstance(found, ClassInfo):
        return None
    bases = [base for _, base in facts.classes.bases(found)]
    return found if any(isinstance(base, External) and base.name in MADE_ONCE for base in bases) else None


def _values(file: File, facts: Facts) -> Iterator[Finding]:
    """Values of a writer that code reads: rank 0's, which other ranks do not know."""
    roles = facts.scripts.roles[file]
    made = {
        v
        for v, value, _, _ in roles.assignments
        if any(_makes(file, facts, item) for item in ast.walk(value)) and not _is_given_folder(value)
    }
    for node in file.nodes:
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        of_writer = node.attr in _VALUES and roles.var(node.value) in made
        of_run = node.attr in _OF_A_RUN and facts.project.external(file, node.value) == "wandb.run"
        parent = file.names.parents[node]
        given = isinstance(parent, ast.Call) and (dotted(parent.func) or "").endswith("broadcast_object")
        if (of_writer or of_run) and not given and not facts.scripts.in_kept_guard(file, node):
            read = file.source.code(parent if isinstance(parent, ast.Call) and parent.func is node else node)
            message = f"{read} is rank 0's: where all ranks need it, write bmt.store.broadcast_object({read})"
            yield Remark(RULE.code, node.lineno, message)


def _is_given_folder(made: ast.expr) -> bool:
    """``SummaryWriter(folder)``: what it says of its folder is what it was told, on every rank."""
    if not isinstance(made, ast.Call):
        return False
    named = [keyword.value for keyword in made.keywords if keyword.arg in _VALUES]
    folder = next(iter([*named, *made.args]), None)
    return folder is not None and not (isinstance(folder, ast.Constant) and folder.value is None)


def _makes(file: File, facts: Facts, node: ast.AST) -> bool:
    """Whether a part of an expression makes a writer, or is the function that makes one on rank 0."""
    return isinstance(node, (ast.Name, ast.Attribute)) and facts.project.external(file, node) in MADE_ONCE


RULE = Rule(
    code="BMT042",
    title="one rank makes the writer of a log",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import wandb
from torch.utils.tensorboard import SummaryWriter
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
writer = SummaryWriter("runs") if log else None
wandb.init(project="x")
optim_manager.backward(model(x).mean())
""",
            """import torch
import wandb
from torch.utils.tensorboard import SummaryWriter
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
writer = bmt.on_rank_0(SummaryWriter)("runs") if log else None
wandb.init(project="x", mode=None if bmt.rank() == 0 else "disabled")
optim_manager.backward(model(x).mean())
""",
        ),
    ),
)
