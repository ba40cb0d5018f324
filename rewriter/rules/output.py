"""Files and loggers are written by one rank.

What: statements that write files or log (``writer.add_scalar``, ``wandb.log``, ``with open(path, "w")``,
``plt.savefig``) get ``if bmt.rank() == 0:``. What they show is computed by every rank first if it needs all of them.
``model.save_pretrained(...)`` of a transformers model is given the ``state_dict`` that every rank helps to make.
Why: several ranks that write one file destroy it; a collective that one rank alone enters waits forever.
Refuses when: the statement gives a value that later code uses, or only one rank reaches it already.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from rewriter.analyze.facts import Facts
from rewriter.analyze.names import dotted, walk
from rewriter.analyze.project import File
from rewriter.analyze.writers import WRITERS, WRITING_METHODS
from rewriter.rules.values import uses
from rewriter.types import Edit, Example, Finding, Rule, Safety, Span

_ALWAYS_RUN = (
    ast.Expr, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.JoinedStr, ast.FormattedValue, ast.BinOp,
    ast.Tuple, ast.List, ast.Dict,
)  # fmt: skip
"""Nodes that evaluate everything below them, once."""
_EVERYWHERE = {"print", "super", "set_postfix", "set_description", "update", "set_epoch", "train", "eval", "append"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    moved = {use.node for use in uses(file, facts)}  # into a block of their own
    joined: set[ast.stmt] = set()
    for node in file.nodes:
        if not isinstance(node, (ast.Expr, ast.With)) or facts.scripts.in_kept_guard(file, node) or node in joined:
            continue
        if facts.scripts.in_opened_guard(file, node) or not _writes(file, facts, node):
            continue
        if saves_only(file, facts, node):
            continue  # BMT026 sees to it
        if _saves_pretrained(file, facts, node):
            assert isinstance(node, ast.Expr)
            edits = tuple(_with_state(file, facts, node))
            yield Finding(RULE.code, node.lineno, "one rank writes what all ranks give", edits)
            continue
        deeper = len(file.source.indent_unit) if any(parent in moved for parent in file.names.ancestors(node)) else 0
        edits = tuple(guard_statement(file, facts, node, outdent=-deeper))
        if edits:
            for follower in _followers(file, facts, node):
                if deeper and follower.end_lineno != follower.lineno:
                    break
                joined.add(follower)
                start = file.source.span(follower).start
                edits = (*edits, Edit(Span(start, start), (file.source.indent_unit,)), *file.source.indented(follower))
        if edits:
            yield Finding(RULE.code, node.lineno, "one rank writes", edits)
        elif isinstance(node, ast.With):
            message = "every rank writes this file: what is written needs all ranks"
            if facts.scripts.collectives.inside(file, node) is not None:
                yield Finding(RULE.code, node.lineno, message, safety=Safety.REPORT)
        elif file.source.owns_lines(node):
            message = f"every rank must call {file.source.code(node.value).split('(')[0]}, and every rank writes"
            yield Finding(RULE.code, node.lineno, message, safety=Safety.REPORT)


def _followers(file: File, facts: Facts, node: ast.stmt) -> Iterator[ast.stmt]:
    """The statements on the next lines that one rank is to run, too, if nothing in them needs all ranks."""
    block = file.names.siblings(node)
    last = node
    for follower in block[block.index(node) + 1 :]:
        if not isinstance(follower, ast.Expr) or follower.lineno != (last.end_lineno or 0) + 1:
            return
        if follower.lineno in file.source.skips or not _writes(file, facts, follower):
            return
        edits = list(guard_statement(file, facts, follower))
        if not edits or not str(edits[0].parts[0]).startswith("if "):  # not left to one rank, or something comes first
            return
        if facts.scripts.collectives.inside(file, follower) is not None or _saves_pretrained(file, facts, follower):
            return
        yield follower
        last = follower


def _saves_pretrained(file: File, facts: Facts, node: ast.stmt) -> bool:
    """Whether a statement saves a model of transformers, whose method takes a state dict."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=receiver, attr="save_pretrained")) as call):
            roles = facts.scripts.roles[file]
            made = [value for variable, value, _, _ in roles.assignments if variable == roles.var(receiver)]
            given = {keyword.arg for keyword in call.keywords}
            return (
                roles.is_model(receiver)
                and not given & {"state_dict", "is_main_process", None}
                and len(call.args) < 2
                and bool(call.args or call.keywords)
                and file.source.owns_lines(node)
                and any(
                    isinstance(item, ast.Call) and facts.project.external(file, item.func).startswith("transformers.")
                    for value in made
                    for item in walk(value)
                )
            )
    return False


def _with_state(file: File, facts: Facts, node: ast.Expr) -> Iterator[Edit]:
    source, call = file.source, node.value
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    span, indent, name = source.span(node), source.indent(node), _name(file, 0, 1)
    given: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
    last = max(source.span(argument).end for argument in given)
    guard = f".state_dict(){source.newline}{indent}if {facts.alias(file)}.rank() == 0:{source.newline}{indent}"
    model = source.span(call.func.value)
    parts = (f"{name} = ", model, guard + source.indent_unit, Span(span.start, last), f", state_dict={name}")
    yield Edit(span, (*parts, Span(last, span.end)), 20)
    yield from source.indented(node)


def _writes(file: File, facts: Facts, node: ast.Expr | ast.With) -> bool:
    """Whether a statement writes something outside the process."""
    if isinstance(node, ast.With):
        return len(node.items) == 1 and _opens_for_writing(node.items[0].context_expr)
    if not isinstance(node.value, ast.Call):
        return False
    if any(isinstance(parent, ast.With) and _writes(file, facts, parent) for parent in file.names.ancestors(node)):
        return False
    if facts.project.external(file, node.value.func) in WRITERS:
        return True
    func = node.value.func
    return isinstance(func, ast.Attribute) and func.attr in WRITING_METHODS


def _opens_for_writing(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call):
        return False
    path = dotted(node.func) or ""
    method = isinstance(node.func, ast.Attribute) and node.func.attr == "open"
    modes = [k.value for k in node.keywords if k.arg == "mode"] + node.args[0 if method and path != "io.open" else 1 :][
        :1
    ]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else ""
    return (path == "open" or method) and isinstance(mode, str) and any(letter in mode for letter in "wax")


def guard_statement(file: File, facts: Facts, node: ast.stmt, opened: bool = False, outdent: int = 0) -> Iterator[Edit]:
    """Edits that leave one statement to one rank, with what needs all ranks computed before.

    With ``opened`` the statement stood in a rank guard that goes, so that everything with a side effect is meant;
    ``outdent`` is by how many characters it moves to the left then (to the right if it is negative).
    """
    collectives = facts.scripts.collectives
    if isinstance(node, (ast.If, ast.For, ast.While)) and opened:
        for statement in (*node.body, *node.orelse):
            yield from guard_statement(file, facts, statement, opened, outdent)
        return
    if saves_only(file, facts, node):
        return
    if isinstance(node, ast.With):
        needs = collectives.inside(file, node) is not None
        if needs and opened and not _writes(file, facts, node):
            for statement in node.body:
                yield from guard_statement(file, facts, statement, opened, outdent)
        elif _writes(file, facts, node) and _only_effects(file, node) and file.source.owns_lines(node):
            calls = [call for statement in node.body for call in collectives.outermost(file, statement)]
            if all(_movable(file, node, call) for call in calls):
                yield from file.source.wrapped(node, f"{facts.alias(file)}.rank() == 0", _named(file, calls), outdent)
        return
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call) or not file.source.owns_lines(node):
        return
    known = facts.project.external(file, node.value.func) in WRITERS
    if not known and (
        (opened and _runs_everywhere(file, facts, node.value)) or collectives.is_collective(file, node.value)
    ):
        return
    given = [*node.value.args, *(keyword.value for keyword in node.value.keywords)]
    inner: list[ast.expr] = [call for argument in given for call in collectives.outermost(file, argument)]
    covered = {item for call in inner for item in walk(call)}
    inner += [g for argument in given for g in walk(argument) if g in facts.values(file).gradients and g not in covered]
    if all(file.source.is_exact(item) for item in inner):
        yield from file.source.wrapped(node, f"{facts.alias(file)}.rank() == 0", _named(file, inner), outdent)


def saves_only(file: File, facts: Facts, node: ast.stmt) -> bool:
    """Whether a block opens a file for one ``torch.save`` and does nothing else."""
    match node:
        case ast.With(body=[ast.Expr(value=ast.Call() as call)]):
            return facts.project.external(file, call.func) == "torch.save" and opened_for(file, call) is not None
    return False


def opened_for(file: File, call: ast.Call) -> tuple[ast.With, ast.expr] | None:
    """The block and the path of ``with open(path, "wb") as f: torch.save(x, f)``, where it does nothing else."""
    statement = file.names.parents[call]
    block = file.names.parents[statement]
    match block:
        case ast.With(
            items=[ast.withitem(ast.Call(func=ast.Name(id="open"), args=[path, *_]), ast.Name(id=name))], body=[only]
        ):
            lost = any(line in file.source.comments for line in range(block.lineno, call.lineno))
            if (
                only is statement
                and not lost
                and len(call.args) == 2
                and not call.keywords
                and file.source.owns_lines(block)
            ):
                return (block, path) if getattr(call.args[1], "id", "") == name else None
    return None


def writes_by_all(file: File, facts: Facts, node: ast.stmt) -> ast.With | None:
    """A block in a rank guard that writes a file and cannot be left to one rank when the guard goes."""
    if isinstance(node, ast.With) and _writes(file, facts, node) and not saves_only(file, facts, node):
        return node if not any(guard_statement(file, facts, node, opened=True)) else None
    if isinstance(node, (ast.If, ast.For, ast.While, ast.With)):
        below = (*node.body, *(() if isinstance(node, ast.With) else node.orelse))
        return next((found for s in below if (found := writes_by_all(file, facts, s)) is not None), None)
    return None


def _movable(file: File, node: ast.With, call: ast.expr) -> bool:
    """Whether a block's expression can be computed in front of it: once, always, and from what is there already."""
    inside = {item for statement in node.body for item in walk(statement)}
    bound = {item.id for item in walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
    above = [parent for parent in file.names.ancestors(call) if parent in inside]
    return (
        all(isinstance(parent, _ALWAYS_RUN) for parent in above)
        and not any(isinstance(item, ast.Name) and item.id in bound for item in walk(call))
        and file.source.is_exact(call)
    )


def _named(file: File, values: Sequence[ast.expr]) -> list[tuple[str, Span]]:
    """New names for expressions, in the order in which they stand."""
    spans = sorted((file.source.span(value) for value in values), key=lambda span: span.start)
    return [(_name(file, number, len(spans)), span) for number, span in enumerate(spans)]


def _only_effects(file: File, node: ast.With) -> bool:
    """Whether a block neither leaves early nor gives values that later code uses."""
    items = [item for statement in node.body for item in walk(statement)]
    if any(isinstance(item, (ast.Return, ast.Yield, ast.Break, ast.Continue)) for item in items):
        return False
    stored = {item.id for item in items if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
    around = file.names.function_of(node) or file.tree
    inside = set(items)
    return not any(
        isinstance(item, ast.Name) and item.id in stored and isinstance(item.ctx, ast.Load) and item not in inside
        for item in walk(around)
    )


def _runs_everywhere(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call in an opened guard is right on every rank: other rules see to it, or it has no outside effect."""
    name = dotted(call.func) or ""
    if facts.project.external(file, call.func) in {"torch.save", "gc.collect", "torch.cuda.empty_cache"}:
        return True
    return name.split(".")[-1] in _EVERYWHERE - {"append"} or name.startswith("bmt.")


def _name(file: File, number: int, count: int) -> str:
    base = "value" if count == 1 else f"value_{number + 1}"
    taken = {name for scope in file.names.scopes.values() for name in scope.bindings}
    while base in taken:
        base += "_"
    return base


RULE = Rule(
    code="BMT033",
    title="files and loggers are written by one rank",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import json
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
for step, x in enumerate(batches):
    loss = model(x).mean()
    optim_manager.backward(loss)
    writer.add_scalar("loss", loss.item(), step)
with open("done.json", "w") as file:
    json.dump({"steps": step}, file)
""",
            """import json
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
for step, x in enumerate(batches):
    loss = model(x).mean()
    optim_manager.backward(loss)
    value = bmt.sum_loss(loss).item()
    if bmt.rank() == 0:
        writer.add_scalar("loss", value, step)
if bmt.rank() == 0:
    with open("done.json", "w") as file:
        json.dump({"steps": step}, file)
""",
        ),
    ),
)
