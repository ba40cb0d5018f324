"""A folder that all ranks make may be there already.

What: ``os.makedirs(path)`` and ``path.mkdir()`` under ``if not os.path.exists(path):`` get ``exist_ok=True``, and
``os.mkdir`` there becomes ``os.makedirs``. Where nothing asks before, one rank makes the folder and the others wait;
where it is not seen that all ranks come there, they may find it made: ``exist_ok=bmt.world_size() > 1``, or
``exist_ok=given or ...`` where a name says. A name made of
the time is rank 0's on all ranks: ``bmt.store.broadcast_object(...)``. So is an option, or a field of settings, that is
the time where it is not given: ``args.out = bmt.store.broadcast_object(args.out)``.
Why: between the question and the call another rank makes the folder; the slower one would stop with FileExistsError,
and the others would wait for it.
Where more is done than to make it (``if not os.path.exists(path): os.makedirs(path); print(path)``), what rank 0 finds
decides for all. Names counted up, ``while os.path.exists(run): ...``, are counted by what rank 0 finds.
Refuses when: the call has ``exist_ok=True`` or its error is caught; only one rank reaches it. Other names chosen by
what is there are reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.training.folders import (
    asked_by_all,
    done_when_made,
    fails_if_there,
    is_asked_for,
    refusals_to_go_on,
)
from rewriter.changes import Arguments, Change, Import, Under, insert_before, insert_behind, replace, template, wrap
from rewriter.rules.one_rank import ONE_RANK
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    yield from _of_moments(file, facts)
    if not (b"mkdir" in file.source.data or b"makedirs" in file.source.data):
        return
    made: list[ast.Call] = []
    for call in file.calls:
        if not fails_if_there(file, facts.project, call) or facts.scripts.in_kept_guard(file, call):
            continue
        if facts.scripts.in_opened_guard(file, call):
            continue
        made.append(call)
        if is_asked_for(file, call):
            changes = tuple(_allowed(file, facts, call))
            yield Conversion(RULE.code, call.lineno, "another rank may have made this folder", changes)
            yield from _more(file, facts, call)
            continue
        statement = file.names.statement_of(call)
        alone = isinstance(statement, ast.Expr) and statement.value is call and file.source.owns_lines(statement)
        if alone and file.names.class_of(call) is None and _is_for_all(file, facts, call):
            one = (Under((statement,), ONE_RANK), insert_behind(statement, "{bmt}.synchronize()"))
            yield Conversion(RULE.code, call.lineno, "one rank makes this folder, the others wait", one)
        else:
            changes = tuple(_allowed(file, facts, call, "{bmt}.world_size() > 1"))
            message = "every rank makes this folder: on several, one that is there already is no error"
            yield Conversion(RULE.code, call.lineno, message, changes)
    asked = set(asked_by_all(file, facts.scripts.entries.get(file, []))) if made else set()
    for test in refusals_to_go_on(file) if made else ():
        agreed = isinstance(test.test, ast.Call) and facts.project.external(file, test.test.func) == "bmtrain.agree"
        if agreed or facts.scripts.in_kept_guard(file, test):
            continue
        if test in asked:
            changes = (wrap(test.test, "{bmt}.agree({it})"),)
            yield Conversion(RULE.code, test.lineno, "what rank 0 finds there decides for all", changes)
        else:
            message = "what is there decides here, and another rank may just have made it: let one rank decide"
            yield Remark(RULE.code, test.lineno, message)


def _more(file: File, facts: Facts, call: ast.Call) -> Iterator[Finding]:
    """What is done beside where a folder is made: rank 0 may find it made by another, and would leave that out."""
    test = done_when_made(file, facts.project, call)
    if test is None or test in facts.decisions.of(file) or _is_agreed(file, facts, test.test):
        return
    if facts.read_back.reached.by_all(file, test):
        changes = (wrap(test.test, "{bmt}.agree({it})"),)
        yield Conversion(RULE.code, test.lineno, "what rank 0 finds there decides for all", changes)
    else:
        message = "another rank may just have made this folder, and what else is done here is left out then"
        yield Remark(RULE.code, test.lineno, f"{message}: let rank 0 decide for all, bmt.agree(...)")


def _is_agreed(file: File, facts: Facts, test: ast.expr) -> bool:
    calls = (item for item in walk(test) if isinstance(item, ast.Call))
    return any(facts.project.external(file, item.func) == "bmtrain.agree" for item in calls)


def _of_moments(file: File, facts: Facts) -> Iterator[Finding]:
    """Folders with the time in their names: rank 0's name is everyone's."""
    told: set[ast.AST] = set()
    for held in facts.moments.shared(file):
        equal = f"{held.access} = {{bmt}}.store.broadcast_object({held.access})"
        message = "an option is the time where it is not given: rank 0's is everyone's"
        yield Conversion(RULE.code, held.where.lineno, message, (insert_before(held.where, equal),))
    for moment in facts.moments.folders(file):
        line, changes = moment.call.lineno, list[Change]()
        if facts.scripts.in_kept_guard(file, moment.call):
            continue
        for item in moment.wrapped:
            if item not in told:
                told.add(item)
                changes.append(wrap(item, "{bmt}.store.broadcast_object({it})"))
        if moment.named is not None and moment.where is not None and moment.where not in told:
            told.add(moment.where)
            changes.append(
                insert_before(moment.where, "{path} = {bmt}.store.broadcast_object({path})", path=moment.named)
            )
        if changes:
            yield Conversion(RULE.code, line, "named by the time: rank 0's name is everyone's", tuple(changes))
        elif not moment.wrapped and moment.named is None and not moment.settings:
            message = "every rank names this by the time that it sees: name it by what all ranks have, as "
            yield Remark(RULE.code, line, message + "bmt.store.broadcast_object(name) gives it")


def _allowed(file: File, facts: Facts, call: ast.Call, when: str = "True") -> Iterator[Change]:
    if facts.project.external(file, call.func) == "os.mkdir":
        if isinstance(call.func, ast.Attribute):
            yield replace(call.func, "{os}.makedirs", os=call.func.value)
        else:
            yield Import("import os")
            yield replace(call.func, "os.makedirs")
    refused = tuple(keyword for keyword in call.keywords if keyword.arg in {"exist_ok", "dir_fd"})
    chosen = [k.value for k in refused if k.arg == "exist_ok" and not isinstance(k.value, ast.Constant)]
    if chosen and when != "True":
        added = template(f"exist_ok={{chosen}} or {when}", chosen=chosen[0])
    else:
        added = template(f"exist_ok={when}")
    yield Arguments(call, added=(added,), dropped=refused)


def _is_for_all(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether all ranks come to a call once they are started: the script itself makes it, in no loop or test."""
    return file in facts.scripts.programs and not any(
        isinstance(parent, (ast.For, ast.While, ast.Try, ast.With, ast.Lambda)) for parent in file.names.ancestors(call)
    )


RULE = Rule(
    code="BMT038",
    title="a folder that all ranks make may be there already",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import os
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
if not os.path.exists("runs"):
    os.makedirs("runs")
os.makedirs("runs/now")
optim_manager.backward(model(x).mean())
""",
            """import os
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
if not os.path.exists("runs"):
    os.makedirs("runs", exist_ok=True)
if bmt.rank() == 0:
    os.makedirs("runs/now")
bmt.synchronize()
optim_manager.backward(model(x).mean())
""",
        ),
    ),
)
