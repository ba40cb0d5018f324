"""A test that decides about a call of all ranks has one answer.

What: ``if not os.path.exists(path):`` above ``bmt.save_checkpoint(...)`` becomes ``if not
bmt.agree(os.path.exists(path)):``, and so do tests of the clock, of random numbers, of environment variables and of
what a model gave, of flags that a handler of signals sets, in ``if``, ``while``, conditional expressions and
``and``/``or``, also where a ``continue``, ``break`` or ``return`` under them leads past the call. A
loop over a list of files goes through rank 0's list. Counts
and means of a rank's share of a batch become the batch's: ``if len(x) < 2:`` is ``if bmt.total(len(x)) < 2:``; in a
script for DDP, whose samplers give all ranks as many samples, it is ``if bmt.agree(len(x) < 2):``. What holds for a
batch if it does on any rank, or on all, is asked of all ranks: ``if bmt.total(torch.isnan(out).any()):``, ``if
bmt.total(not torch.isfinite(out).all()):``. Other tests of what a model makes of a share are rank 0's, and reported.
A file that is read where ``except FileNotFoundError`` catches that it is not there is there for all ranks or for none:
``if not bmt.agree(os.path.exists(path)): raise FileNotFoundError(path)`` stands in front.
A handler of signals that saves is reported, and so is what saves at exit. What ``except KeyboardInterrupt:`` is around,
where what follows is for all ranks, goes under ``with bmt.interrupted_together():``, from which Ctrl-C leads after the
same step on all ranks. An ``except`` around training in which a rank would go on alone begins with
``if bmt.world_size() > 1: raise``.
Why: rank 0 may write a file before rank 1 asks for it, and no two clocks are the same; a rank that decides otherwise
does not make the call, and the others wait for it forever.
Refuses when: the test is of other values of a rank's share of a batch (``x.max() > 9``), or of one of which it is not
seen whether it is a share; it compares a rank with something; one rank alone would leave (a remark, if the script had
ranks before); a file whose path is not seen is caught if it is not there, or any error is suppressed: then the file
stays as it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.training.decisions import Verdict
from rewriter.changes import Change, Under, insert_before, template, wrap
from rewriter.rules.imports import imports
from rewriter.rules.of_shares import made_whole
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark

_INTERRUPTED = (
    "Ctrl-C, or an error, meets each rank at another place, and {where} needs all of them: with several ranks it may "
    "end the job instead, saying so; what is to be kept has to be saved in the loop"
)
_SIGNALLED = (
    "a signal meets each rank at another place, and line {line} needs all of them: set a flag here, and do that where "
    "the loop tests it"
)
_AT_EXIT = (
    "all ranks do at the end what line {line} needs them for, but Ctrl-C or an error meets each at another place: it "
    "may end the job instead, saying so; except KeyboardInterrupt: around training is for that"
)
_RAISED = "with several ranks an error ends the job here: a rank that goes on alone would leave the others waiting"


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for call, handlers in facts.scripts.collectives.instances.signal_handlers(file):
        bodies: list[tuple[File, ast.AST]] = [(one.file, item) for one in handlers for item in one.node.body]
        bodies += [(file, call.args[1].body)] if isinstance(call.args[1], ast.Lambda) else []
        places = [place for other, body in bodies if (place := facts.scripts.collectives.inside(other, body))]
        if places:
            yield Remark(RULE.code, call.lineno, _SIGNALLED.format(line=places[0].lineno), differs=True)
    yield from _at_exit(file, facts)
    made: set[ast.expr] = set()
    refused: set[int] = set()
    for verdict in facts.decisions.verdicts(file):
        node, what = verdict.decision.node, _what(file, verdict)
        if verdict.reason and node.lineno not in refused:
            refused.add(node.lineno)
            message = f"{what} is for all ranks, but {verdict.reason}"
            yield (
                Remark(RULE.code, node.lineno, message)
                if verdict.as_before
                else Refusal(RULE.code, node.lineno, message)
            )
        changes: list[Change] = []
        for test in verdict.tests:
            if test not in made:
                made.add(test)
                changes.append(wrap(test, "{bmt}.agree({it})"))
        for part, share in verdict.shares.items():
            if part not in made:
                made.add(part)
                changes.append(made_whole(part, share))
        for test, ranks in verdict.joined.items():
            if test not in made:
                made.add(test)
                changes.append(_of_all_ranks(file, test, ranks))
        if verdict.unjoined is not None:
            seen = file.source.code(verdict.unjoined).replace("\n", " ")
            message = f"{seen} is of a rank's share of the batch, and rank 0's decides for all"
            yield Remark(RULE.code, verdict.unjoined.lineno, message, differs=True)
        for listed in verdict.listed:
            if listed not in made:
                made.add(listed)
                changes.append(wrap(listed, "{bmt}.store.broadcast_object(list({it}))"))
        for path in verdict.missed:
            if path not in made and file.source.is_exact(path):
                made.add(path)
                lines = ("if not {bmt}.agree(os.path.exists({path})):", "    raise FileNotFoundError({path})")
                changes += [*imports(file, "os"), insert_before(file.names.statement_of(path), *lines, path=path)]
        if verdict.interrupted is not None:
            yield from _interrupted(file, facts, verdict, verdict.interrupted)
        for handler in verdict.raised:
            raises = insert_before(handler.body[0], "if {bmt}.world_size() > 1:", "    raise")
            yield Conversion(RULE.code, handler.lineno, _RAISED, (raises,))
        if changes:
            whole = (verdict.shares or verdict.joined) and not verdict.tests
            message = f"{'the whole batch' if whole else 'rank 0'} decides for all: {what} is for all ranks"
            yield Conversion(RULE.code, node.lineno, message, tuple(changes))


def _at_exit(file: File, facts: Facts) -> Iterator[Finding]:
    """``atexit.register(save)``, which runs behind errors as well."""
    collectives = facts.scripts.collectives
    for _, call in facts.project.calls_of([file], {"atexit.register"}) if b"atexit" in file.source.data else ():
        given = call.args[0] if call.args else None
        bodies: list[tuple[File, ast.AST]] = [(file, given.body)] if isinstance(given, ast.Lambda) else []
        if isinstance(given, (ast.Name, ast.Attribute)):
            bodies += [
                (one.file, item) for one in collectives.instances.functions(file, given) for item in one.node.body
            ]
        place = next((found for other, body in bodies if (found := collectives.inside(other, body))), None)
        if place is not None:
            yield Remark(RULE.code, call.lineno, _AT_EXIT.format(line=place.lineno))


def _interrupted(file: File, facts: Facts, verdict: Verdict, what: ast.stmt) -> Iterator[Finding]:
    """What is for all ranks behind Ctrl-C: they take it after the same step, where it is caught."""
    node, caught = verdict.decision.node, facts.decisions.caught
    if not isinstance(node, ast.Try) or not caught.stopped_by_hand(file, node):
        yield Remark(RULE.code, node.lineno, _INTERRUPTED.format(where=f"line {what.lineno}"))
    elif not caught.is_stopped_together(file, node):
        if all(file.source.owns_lines(statement) for statement in node.body):
            under = Under(tuple(node.body), template("with {bmt}.interrupted_together():"))
            yield Conversion(RULE.code, node.lineno, "Ctrl-C meets all ranks after the same step", (under,))
        else:
            yield Remark(RULE.code, node.lineno, _INTERRUPTED.format(where=f"line {what.lineno}"))


def _of_all_ranks(file: File, test: ast.expr, ranks: str) -> Change:
    """``bmt.total(mask.any())``, ``bmt.total(not same.all())``: truth values count as 0 and 1."""
    parent = file.names.parents[test]
    if ranks == "any":
        return wrap(test, "{bmt}.total({it})")
    if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
        return wrap(parent, "{bmt}.total({it})")
    return wrap(test, "not {bmt}.total(not {it})")


def _what(file: File, verdict: Verdict) -> str:
    call = verdict.decision.call
    if isinstance(call, ast.Call):
        return f"{file.source.code(call.func)}(...)".replace("\n", " ")
    return file.source.code(call).partition("\n")[0]


RULE = Rule(
    code="BMT039",
    title="a test that decides about a call of all ranks has one answer",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import os
import time
import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optim_manager = bmt.optim.OptimManager(loss_scale=None)
if not os.path.exists("first.pt"):
    torch.save(model.state_dict(), "first.pt")
for step, x in enumerate(batches):
    optim_manager.backward(model(x).mean())
    if step % 10 == 0 and time.time() - start > 600:
        torch.save(model.state_dict(), "last.pt")
        break
""",
            """import os
import time
import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optim_manager = bmt.optim.OptimManager(loss_scale=None)
if not bmt.agree(os.path.exists("first.pt")):
    bmt.save(model, "first.pt")
for step, x in enumerate(batches):
    optim_manager.backward(model(x).mean())
    if step % 10 == 0 and bmt.agree(time.time() - start > 600):
        bmt.save(model, "last.pt")
        break
""",
        ),
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optim_manager = bmt.optim.OptimManager(loss_scale=None)
try:
    model.load_state_dict(torch.load(path))
except FileNotFoundError:
    pass
try:
    for x in batches:
        optim_manager.backward(model(x).mean())
except KeyboardInterrupt:
    torch.save(model.state_dict(), path)
""",
            """import torch
import bmtrain as bmt
import os

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optim_manager = bmt.optim.OptimManager(loss_scale=None)
try:
    if not bmt.agree(os.path.exists(path)):
        raise FileNotFoundError(path)
    model.load_state_dict(torch.load(path))
except FileNotFoundError:
    pass
try:
    with bmt.interrupted_together():
        for x in batches:
            optim_manager.backward(model(x).mean())
except KeyboardInterrupt:
    bmt.save(model, path)
""",
        ),
    ),
)
