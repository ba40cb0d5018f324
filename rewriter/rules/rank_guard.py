"""Every rank enters a rank guard that holds a collective.

What: ``if rank == 0:`` around ``state_dict()``, an evaluation, ``generate`` or a forward goes; ``if step % n == 0 and
rank == 0:`` keeps its first half. What only one rank may do inside (writing files, logging) gets a guard of its own.
Why: a collective that one rank alone enters waits for the others forever.
Refuses when: the guard has an else branch, or sends the other ranks away (``if rank != 0: return``) before a
collective: then the file stays as it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.collectives import Guard, is_other_rank_test, rank_flags
from rewriter.analyze.facts import Facts
from rewriter.analyze.names import dotted
from rewriter.analyze.project import File
from rewriter.rules.output import guard_statement, writes_by_all
from rewriter.types import Edit, Example, Finding, Part, Rule, Safety, Span

_LEAVES = (ast.Return, ast.Continue, ast.Break, ast.Raise)


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    for guard in facts.scripts.opened_guards(file).values():
        call = next(c for s in guard.node.body if (c := facts.scripts.collectives.inside(file, s)) is not None)
        what = file.source.code(call.func)
        reason = _reason_against(file, facts, guard)
        if reason:
            message = f"{what}(...) is for all ranks, but {reason}"
            yield Finding(RULE.code, guard.node.lineno, message, safety=Safety.REPORT, stop=True)
            continue
        edits = tuple(_open(file, facts, guard))
        yield Finding(RULE.code, guard.node.lineno, f"every rank enters: {what}(...) is for all ranks", edits)
    yield from _early_exits(file, facts)


def _reason_against(file: File, facts: Facts, guard: Guard) -> str:
    for node in ast.walk(guard.node.test):
        if rank_flags(file).get(dotted(node) or ""):
            return f"{dotted(node)} is true on one rank only, and not on that account alone"
    if guard.node.orelse:
        return "the rank guard around it has an else branch"
    if not guard.rest and not file.source.code(guard.node).startswith("if"):
        return "the rank guard around it is an elif"
    written = (writes_by_all(file, facts, statement) for statement in guard.node.body)
    if any(statement is not None for statement in written):
        return "it is called while one rank has a file open to write"
    return ""


def _open(file: File, facts: Facts, guard: Guard) -> Iterator[Edit]:
    source, node = file.source, guard.node
    if guard.rest:
        parts: list[Part] = []
        for operand in guard.rest:
            parts.extend([" and "] if parts else [])
            # Parentheses are no part of an expression; without them ``or`` would bind less, and a line might end.
            simple = isinstance(operand, (ast.Name, ast.Attribute, ast.Call, ast.Compare))
            bare = simple and "\n" not in source.code(operand)
            parts.extend([source.span(operand)] if bare else ["(", source.span(operand), ")"])
        yield Edit(source.span(node.test), tuple(parts))
    elif node.body[0].lineno == node.lineno:
        yield Edit(Span(source.span(node).start, source.span(node.body[0]).start), ())
        return
    else:
        first = node.body[0]
        yield Edit(
            Span(source.line_start(node.lineno), source.line_start(_first_line(source.comments, node, first))), ()
        )
        for statement in node.body:
            yield from source.dedented(statement, source.indent(node))
        yield from _comment_lines(file, node)
    outdent = 0 if guard.rest else len(source.indent(node.body[0])) - len(source.indent(node))
    for statement in node.body:
        yield from guard_statement(file, facts, statement, True, outdent)


def _first_line(comments: dict[int, str], node: ast.If, first: ast.stmt) -> int:
    """The first line of the body, its leading comments included."""
    line = first.lineno
    while line - 1 > (node.test.end_lineno or node.lineno) and line - 1 in comments:
        line -= 1
    return line


def _comment_lines(file: File, node: ast.If) -> Iterator[Edit]:
    """Comments on lines of their own between the body's statements move out with them."""
    source = file.source
    own, outer = source.indent(node.body[0]), source.indent(node)
    covered = {line for s in node.body for line in range(s.lineno, (s.end_lineno or s.lineno) + 1)}
    for line in range(node.lineno + 1, (node.end_lineno or node.lineno) + 1):
        start = source.line_start(line)
        if line in source.comments and line not in covered and source.data[start : start + len(own)] == own.encode():
            yield Edit(Span(start + len(outer), start + len(own)), ())


def _early_exits(file: File, facts: Facts) -> Iterator[Finding]:
    """``if rank != 0: return`` in front of a collective."""
    for node in file.nodes:
        if not isinstance(node, ast.If) or not isinstance(node.body[-1], _LEAVES):
            continue
        if not is_other_rank_test(file, node.test) or isinstance(node.body[-1], ast.Raise):
            continue
        block = file.names.siblings(node)
        for statement in block[block.index(node) + 1 :]:
            call = facts.scripts.collectives.inside(file, statement)
            if call is not None:
                message = f"{file.source.code(call.func)}(...) is for all ranks, but only one gets past this line"
                yield Finding(RULE.code, node.lineno, message, safety=Safety.REPORT, stop=True)
                break


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
