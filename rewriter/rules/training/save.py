"""Checkpoints are written by one rank, from values all ranks give.

What: ``torch.save(model.state_dict(), path)`` becomes ``bmt.save(model, path)``; other ``torch.save(...)`` become
``bmt.save_checkpoint(...)``.
Why: ``state_dict()`` gathers the shards of all ranks, so every rank must call it; one then writes the file, whole or
not at all. The file is what the unconverted script writes.
An object of the project that holds an optimizer (``{"optimizer": self.wrapper}``) is reported: no file takes it.
Refuses when: only one rank reaches the call and nothing in it needs the others: then torch.save is right. So it is for
what each rank writes to a file with its number in the name, which holds no state of a model. It writes to
an open file: then that is left to one rank. ``with open(path, "wb") as f: torch.save(x, f)`` becomes one call.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.rank_names import is_rank
from rewriter.analyze.training.writers import is_open_file, opened_for
from rewriter.changes import Change, Keep, Unblock, replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_DEEP = 3
_OWN = (
    "each rank wrote a file of its own name here, and the state is one now, which rank 0 writes by its name: name it "
    "without the rank, and read it so"
)


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or b"save" not in file.source.data:
        return
    roles = facts.scripts.roles[file]
    for node in file.calls:
        if facts.project.external(file, node.func) != "torch.save":
            continue
        if facts.scripts.in_kept_guard(file, node):
            continue
        opened = opened_for(file, node)
        if opened is None and len(node.args) > 1 and is_open_file(file, node.args[1]):
            continue  # one rank writes, as BMT033 says, what all ranks give
        what = node.args[0] if node.args else None
        path = node.args[1] if len(node.args) > 1 else None
        if what is not None and path is not None and _names_rank(file, path):
            if not _holds_state(file, facts, what):
                continue  # each rank's own
            yield Remark(RULE.code, node.lineno, _OWN, differs=True)
        if (
            len(node.args) == 2
            and not node.keywords
            and isinstance(what, ast.Call)
            and isinstance(what.func, ast.Attribute)
            and what.func.attr == "state_dict"
            and not what.args
            and roles.is_model(what.func.value)
        ):
            changes: tuple[Change, ...] = (
                replace(node.func, "{bmt}.save"),
                replace(what, "{model}", model=what.func.value),
            )
        else:
            changes = (replace(node.func, "{bmt}.save_checkpoint"),)
        if opened is not None:
            block, path = opened
            alone = Keep(block, block.body[0]) if len(block.body) == 1 else Unblock(block)
            changes = (*changes, replace(node.args[1], "{path}", path=path), alone)
        yield Conversion(RULE.code, node.lineno, "all ranks give the checkpoint, one writes it", changes)
        for held in _held(file, what) if what is not None else ():
            optimizer = _optimizer_of(file, facts, held)
            if optimizer:
                code = file.source.code(held)
                state = f"{code}.{optimizer}.state_dict()"
                message = f"{code} holds an optimizer, of which ranks have parts, and cannot be written: save {state}"
                yield Remark(RULE.code, held.lineno, message, differs=True)


def _names_rank(file: File, path: ast.expr, deep: int = 0) -> bool:
    """Whether a path, or what it is made of, has a rank's number in it, so that each rank has a file of its own."""
    return any(
        is_rank(file, item)
        or (
            isinstance(item, ast.Name)
            and deep < _DEEP
            and any(_names_rank(file, value, deep + 1) for value in file.names.values_of(item))
        )
        for item in walk(path)
        if isinstance(item, ast.expr)
    )


def _holds_state(file: File, facts: Facts, what: ast.expr) -> bool:
    """Whether a file gets what ranks have parts of: a model, or the state of one or of an optimizer."""
    roles = facts.scripts.roles[file]
    held = [what, *(file.names.values_of(what) if isinstance(what, ast.Name) else ())]
    return any(
        (isinstance(item, ast.Attribute) and item.attr == "state_dict")
        or (isinstance(item, ast.expr) and (roles.is_model(item) or roles.var(item) in roles.optimizers))
        for part in held
        for item in walk(part)
    )


def _held(file: File, what: ast.expr, names: tuple[str, ...] = ()) -> Iterator[ast.expr]:
    """What goes into a file: the entries of a dict that is written out, there or where its name is given it.

    Of ``names``, whose values they are, a value may be made again: ``state = {**state, "epoch": epoch}``.
    """
    match what:
        case ast.Dict(values=values) | ast.Tuple(elts=values) | ast.List(elts=values):
            for value in values:
                yield from _held(file, value, names)
        case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
            for keyword in keywords:
                yield from _held(file, keyword.value, names)
        case ast.Name():
            yield what
            for value in file.names.values_of(what) if what.id not in names else ():
                if isinstance(value, (ast.Dict, ast.Call)):
                    yield from _held(file, value, (*names, what.id))
        case ast.Attribute():
            yield what


def _optimizer_of(file: File, facts: Facts, held: ast.expr) -> str:
    """The attribute by which an object of the project, that is no module, holds an optimizer; empty without one."""
    cls = facts.scripts.collectives.instances.class_of(file, held)
    if cls is None or cls.file not in facts.scripts.training or facts.classes.is_module(cls):
        return ""
    roles = facts.scripts.roles[cls.file]
    held_ones = (node for node in ast.walk(cls.node) if isinstance(node, ast.Attribute))
    return next((n.attr for n in held_ones if dotted(n) == f"self.{n.attr}" and roles.var(n) in roles.optimizers), "")


RULE = Rule(
    code="BMT026",
    title="checkpoints are written by one rank, from values all ranks give",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
optim_manager.backward(model(torch.ones(1, 8)).mean())
torch.save(model.state_dict(), "model.pt")
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "all.pt")
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
optim_manager.backward(model(torch.ones(1, 8)).mean())
bmt.save(model, "model.pt")
bmt.save_checkpoint({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "all.pt")
""",
        ),
    ),
)
