"""Every rank enters a rank guard that holds a collective.

What: ``if rank == 0:`` around ``state_dict()``, an evaluation, ``generate``, a forward or ``p.grad`` goes;
``if step % n == 0 and rank == 0:`` keeps its first half, as does each side of
``if not parallel or (parallel and rank == 0):``. So does a guard in which such a guard's names get their
values, or in which a loss is averaged that is read as that of all ranks. Text, numbers and paths that a guard with an
else branch gives names to are rank 0's on all ranks, where such a guard reads them. ``Average(model) if rank == 0 else
None`` is made by all. A decorator that lets one rank alone into a function with a collective (``@master_only``) goes.
``if rank != 0: continue`` (or ``return``) in front of a collective goes as well, and so do the barriers by which the
first rank goes first (``if rank not in [-1, 0]: barrier()``, ``if rank == 0: barrier()``) around what is for all ranks,
and locks on files around it (``with FileLock(path):``). What only one rank may do inside, or behind it (writing files,
logging), gets a guard of its own.
Why: a collective that one rank alone enters waits for the others forever.
Refuses when: the guard has an else branch, or sends the other ranks away before a collective with more to do
(``if rank != 0: dist.barrier(); return``), or out of a loop: then the file stays as it is. So it does where an object
of a package saves the model (``timm.utils.CheckpointSaver``): one rank alone cannot, and all ranks would write the same
files. ``if rank == -1:`` is no guard but what no launcher has started, and false on every rank: where the script was
not for several ranks, it is reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import Function, dotted
from rewriter.analyze.training.collectives import (
    Exit,
    Guard,
    asks_for_launcher,
    exits,
    is_rank_test,
    lets_one_rank_in,
    rank_flags,
    rest_of,
)
from rewriter.analyze.training.opened import told_by_one
from rewriter.analyze.training.turns import turns
from rewriter.changes import Change, Remove, Unblock, Undecorate, insert_behind, replace
from rewriter.rules.one_rank import guarded, guarded_inside, writes_by_all
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark

_PLAIN = {
    "join", "Path", "str", "int", "float", "len", "format", "strftime", "time", "abspath", "basename", "dirname",
    "resolve", "replace", "round", "expanduser",
}  # fmt: skip


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for guard in facts.scripts.opened_guards(file).values():
        collectives = facts.scripts.collectives
        call = next((c for s in guard.node.body if (c := collectives.inside(file, s)) is not None), None)
        read = next(filter(None, map(collectives.gradient_read, guard.node.body)), None)
        if call is not None:
            what = f"{file.source.code(call.func)}(...)"
        elif read is not None:
            what = file.source.code(read)
        else:
            what = "what it gives a name to"
        reason = _reason_against(file, facts, guard)
        if reason:
            message = f"{what} is for all ranks, but {reason}"
            yield Refusal(RULE.code, guard.node.lineno, message)
            continue
        changes = tuple(_open(file, facts, guard))
        yield Conversion(RULE.code, guard.node.lineno, f"every rank enters: {what} is for all ranks", changes)
    yield from _undecorated(file, facts)
    yield from _together(file, facts)
    yield from _told(file, facts)
    yield from _chosen(file, facts)
    yield from _early_exits(file, facts)
    for call in file.calls:
        if facts.scripts.collectives.saves_for_package(file, call):
            message = (
                f"{file.source.code(call.func)}(...) is a package's, and saves the model: one rank alone cannot, and "
                "all would write the same files; save it in the script, torch.save(model.state_dict(), path)"
            )
            yield Refusal(RULE.code, call.lineno, message)
    if not facts.scripts.was_parallel(file) and not facts.scripts.started:
        yield from _launcher_asked(file)


def _undecorated(file: File, facts: Facts) -> Iterator[Conversion]:
    """Functions with a collective that a decorator keeps all ranks but one out of."""
    for function in (node for node in file.nodes if isinstance(node, Function) and node.decorator_list):
        calls = (facts.scripts.collectives.needs_all(file, statement) for statement in function.body)
        call = next(filter(None, calls), None)
        for decorator in function.decorator_list if call is not None else ():
            if call is not None and lets_one_rank_in(file, facts.project, decorator):
                message = f"every rank enters {function.name}: {file.source.code(call.func)}(...) is for all ranks"
                changes = [change for statement in function.body for change in guarded_inside(file, facts, statement)]
                alone = [change for change in changes if guarded(file, facts, change.statements[0]) is None]
                yield Conversion(RULE.code, decorator.lineno, message, (Undecorate(function, decorator), *alone))


def _told(file: File, facts: Facts) -> Iterator[Finding]:
    """Names that a guard which stays gives values to, and that all ranks read in one which goes."""
    behind: dict[ast.If, list[str]] = {}
    for guard, node, reader in told_by_one(file, facts.scripts.opened_guards(file)):
        name = file.source.code(node)
        values = [value for value in _given(guard.node, name) if value is not None]
        plain = bool(values) and all(_is_plain(value) for value in values) and not guard.rest
        if plain and guard.node.lineno < getattr(reader, "lineno", 0):
            behind.setdefault(guard.node, []).append(name)
        else:
            message = f"{name} has a value on one rank only, and every rank reads it in line {node.lineno}"
            yield Remark(RULE.code, guard.node.lineno, message, differs=True)
    for owner, names in behind.items():
        lines = [f"{name} = {{bmt}}.store.broadcast_object({name} if {{bmt}}.rank() == 0 else None)" for name in names]
        message = f"all ranks are told {', '.join(names)}"
        yield Conversion(RULE.code, owner.lineno, message, (insert_behind(owner, *lines),))


def _given(guard: ast.If, name: str) -> Iterator[ast.expr | None]:
    for statement in guard.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign) and name in map(dotted, node.targets):
                yield node.value


def _is_plain(value: ast.expr) -> bool:
    """Whether a value is text, a number or a path, which another rank can be told."""
    match value:
        case ast.Constant() | ast.JoinedStr():
            return True
        case ast.BinOp(left=left, op=ast.Div() | ast.Add() | ast.Mod(), right=right):
            return _is_plain(left) or _is_plain(right)
        case ast.Call(func=func):
            return (dotted(func) or "").split(".")[-1] in _PLAIN or getattr(func, "attr", "") in _PLAIN
    return False


def _lift(file: File, facts: Facts, found: Exit, what: str) -> Finding:
    """No rank leaves in front of a collective; what only one may do behind it gets a guard of its own."""
    reason = _mixed_flag(file, found.node.test)
    if not reason and not found.rest and not file.source.code(found.node).startswith("if"):
        reason = "the other ranks leave in an elif"
    if not reason and any(writes_by_all(file, facts, statement) is not None for statement in found.behind):
        reason = "it is called while one rank has a file open to write"
    if reason:
        return Refusal(RULE.code, found.node.lineno, f"{what} is for all ranks, but {reason}")
    holes = {f"operand_{number}": operand for number, operand in enumerate(found.rest)}
    kept = " or ".join(f"{{{name}}}" for name in holes)
    changes: list[Change] = [replace(found.node.test, kept, **holes) if holes else Remove(found.node)]
    for statement in found.behind:
        changes += guarded_inside(file, facts, statement)
    return Conversion(RULE.code, found.node.lineno, f"no rank leaves here: {what} is for all ranks", tuple(changes))


def _mixed_flag(file: File, test: ast.expr) -> str:
    mixed = (dotted(node) for node in ast.walk(test) if rank_flags(file).get(dotted(node) or ""))
    return next((f"{name} is true on one rank only, and not on that account alone" for name in mixed), "")


def _reason_against(file: File, facts: Facts, guard: Guard) -> str:
    if reason := _mixed_flag(file, guard.node.test):
        return reason
    if guard.node.orelse:
        return "the rank guard around it has an else branch"
    if not guard.rest and not file.source.code(guard.node).startswith("if"):
        return "the rank guard around it is an elif"
    written = (writes_by_all(file, facts, statement) for statement in guard.node.body)
    if any(statement is not None for statement in written):
        return "it is called while one rank has a file open to write"
    return ""


def _open(file: File, facts: Facts, guard: Guard) -> Iterator[Change]:
    node = guard.node
    if guard.either:
        for test in guard.either:
            rest = rest_of(file, test)
            holes = {f"operand_{number}": operand for number, operand in enumerate(rest)}
            yield replace(test, " and ".join(f"{{{name}}}" for name in holes), **holes)
    elif guard.rest:
        holes = {f"operand_{number}": operand for number, operand in enumerate(guard.rest)}
        yield replace(node.test, " and ".join(f"{{{name}}}" for name in holes), **holes)
    else:
        yield Unblock(node)
    for statement in node.body:
        yield from guarded_inside(file, facts, statement)


def _together(file: File, facts: Facts) -> Iterator[Finding]:
    """What the first rank does before the others is done by all at once, where it is for all ranks."""
    scripts = facts.scripts
    for turn in turns(file, scripts):
        calls = ((where, scripts.collectives.needs_all(where, item)) for where, item in turn.body)
        found = next(((where, call) for where, call in calls if call is not None), None)
        if found is not None:
            what = f"{found[0].source.code(found[1].func)}(...) is for all ranks"
        elif any(scripts.entry.constructs(where, item) for where, item in turn.body):
            what = "a model is made by all ranks"
        else:
            continue
        if turn.block is not None:
            yield Conversion(RULE.code, turn.block.lineno, f"no rank goes first: {what}", (Unblock(turn.block),))
        elif turn.waits is not None:
            changes = tuple(Remove(statement) for statement in turn.waits)
            yield Conversion(RULE.code, turn.waits[0].lineno, f"no rank waits here: {what}", changes)


def _chosen(file: File, facts: Facts) -> Iterator[Finding]:
    """``ema = Average(model) if rank == 0 else None``."""
    for node in file.nodes:
        if not isinstance(node, ast.IfExp) or not is_rank_test(file, node.test):
            continue
        nothing = isinstance(node.orelse, ast.Constant) and node.orelse.value is None
        roles = facts.scripts.roles[file]
        copies = any(roles.is_model(item) for item in ast.walk(node.body) if isinstance(item, ast.expr))
        if nothing and (copies or facts.scripts.collectives.inside(file, node.body) is not None):
            what = file.source.code(node.body).partition("\n")[0]
            if file.source.is_exact(node):
                message = f"every rank makes what is for all ranks: {what}"
                yield Conversion(RULE.code, node.lineno, message, (replace(node, "{made}", made=node.body),))


def _early_exits(file: File, facts: Facts) -> Iterator[Finding]:
    """``if rank != 0: return`` in front of a collective."""
    for found in exits(file):
        calls = (facts.scripts.collectives.inside(file, statement) for statement in found.behind)
        call = next(filter(None, calls), None)
        if call is not None and found.alone:
            yield _lift(file, facts, found, f"{file.source.code(call.func)}(...)")
        elif call is not None:
            message = f"{file.source.code(call.func)}(...) is for all ranks, but only one gets past this line"
            yield Refusal(RULE.code, found.node.lineno, message)


def _launcher_asked(file: File) -> Iterator[Remark]:
    """``if rank == -1:`` in a script that nobody has run on several ranks."""
    for node in file.nodes:
        if isinstance(node, ast.Compare) and asks_for_launcher(file, node) and not _only_hands_on(file, node):
            asked = file.source.code(node)
            message = f"{asked} has the other answer under torchrun, on every rank: see that this is meant"
            yield Remark(RULE.code, node.lineno, message, differs=True)


def _only_hands_on(file: File, asked: ast.Compare) -> bool:
    """``if RANK != -1: args.local_rank = RANK``: the rank gets another name, and nothing else happens."""
    statement = file.names.statement_of(asked)
    return (
        isinstance(statement, ast.If)
        and not statement.orelse
        and asked in ast.walk(statement.test)
        and all(
            isinstance(inner, ast.Assign) and ast.dump(inner.value) == ast.dump(asked.left) for inner in statement.body
        )
    )


RULE = Rule(
    code="BMT031",
    title="every rank enters a rank guard that holds a collective",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
if bmt.rank() == 0:
    # the state
    state = {"model": model.state_dict()}
    history.append(1)
    torch.save(state, path)
if done and bmt.rank() == 0:
    print(model(x).mean())
if bmt.rank() == 0:
    print("kept")
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.backward(model(x).mean())
# the state
state = {"model": model.state_dict()}
if bmt.rank() == 0:
    history.append(1)
bmt.save_checkpoint(state, path)
if done:
    bmt.print_rank(model(x).mean())
if bmt.rank() == 0:
    print("kept")
""",
        ),
    ),
)
