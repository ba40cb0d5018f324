"""Leaving a statement to one rank, with what needs all ranks computed before."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.effects import changes_state
from rewriter.analyze.training.writers import WRITERS, saves_only, writes
from rewriter.changes import Change, Under, template, wrap
from rewriter.rules.imports import imports

ONE_RANK = template("if {bmt}.rank() == 0:")
_ALWAYS_RUN = (
    ast.Expr, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.JoinedStr, ast.FormattedValue, ast.BinOp,
    ast.Tuple, ast.List, ast.Dict,
)  # fmt: skip
"""Nodes that evaluate everything below them, once."""
_CHANGE_A_LIST = {"append", "extend", "insert", "pop", "popleft", "remove", "clear", "add", "discard"}
_EVERYWHERE = {"print", "super", "set_postfix", "set_description", "update", "set_epoch", "train", "eval"}


def guarded(file: File, facts: Facts, node: ast.stmt, opened: bool = False) -> Under | None:
    """The change that leaves a statement to one rank; None if all ranks are to run it, or have to.

    With ``opened`` the statement stood in a rank guard that goes, so that everything with a side effect is meant. Where
    it did not, what it changes beside what it writes is for all ranks to change: an item that it takes from a list is
    taken before, and a block that changes more than its file is left to all.
    """
    collectives = facts.scripts.collectives
    if saves_only(file, facts.project, node):
        return None
    if isinstance(node, ast.With):
        if not writes(file, facts.project, node) or not _only_effects(file, node) or not file.source.owns_lines(node):
            return None
        if not opened and changes_state(file, collectives.instances, node):
            return None
        calls = [call for statement in node.body for call in collectives.outermost(file, statement)]
        movable = all(_movable(file, node, call) for call in calls)
        return Under((node,), ONE_RANK, _named(file, calls)) if movable else None
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call) or not file.source.owns_lines(node):
        return None
    known = facts.project.external(file, node.value.func) in WRITERS
    everywhere = opened and _runs_everywhere(file, facts, node.value)
    if not known and (everywhere or collectives.is_collective(file, node.value)):
        return None
    given = [*node.value.args, *(keyword.value for keyword in node.value.keywords)]
    owner = [node.value.func.value] if isinstance(node.value.func, ast.Attribute) else []
    shared = [] if opened else [item for item in (*owner, *given) if changes_state(file, collectives.instances, item)]
    inner: list[ast.expr] = [item.value if isinstance(item, ast.Starred) else item for item in shared]
    inner += [call for argument in given if argument not in shared for call in collectives.outermost(file, argument)]
    covered = {item for call in inner for item in walk(call)}
    gathered = facts.values(file).gradients | facts.values(file).shown
    inner += [item for argument in given for item in walk(argument) if item in gathered and item not in covered]
    exact = all(file.source.is_exact(item) for item in inner)
    return Under((node,), ONE_RANK, _named(file, inner)) if exact else None


def guarded_inside(file: File, facts: Facts, node: ast.stmt) -> Iterator[Under]:
    """The changes that leave to one rank what stood, with a statement, in a rank guard that goes."""
    inside: list[ast.stmt] | None = None
    if isinstance(node, (ast.If, ast.For, ast.While)):
        inside = [*node.body, *node.orelse]
    elif isinstance(node, ast.With) and not writes(file, facts.project, node):
        inside = node.body if facts.scripts.collectives.inside(file, node) is not None else []
    if inside is not None:
        for statement in inside:
            yield from guarded_inside(file, facts, statement)
    elif (guard := guarded(file, facts, node, opened=True)) is not None:
        yield guard


def writes_by_all(file: File, facts: Facts, node: ast.stmt) -> ast.With | None:
    """A block in a rank guard that writes a file and cannot be left to one rank when the guard goes."""
    if isinstance(node, ast.With) and writes(file, facts.project, node) and not saves_only(file, facts.project, node):
        return node if guarded(file, facts, node, opened=True) is None else None
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


def _named(file: File, values: Sequence[ast.expr]) -> tuple[tuple[str, ast.expr], ...]:
    """New names for expressions, in the order in which they stand."""
    ordered = sorted(values, key=lambda value: (value.lineno, value.col_offset))
    return tuple((unused_name(file, number, len(ordered)), value) for number, value in enumerate(ordered))


def _only_effects(file: File, node: ast.With) -> bool:
    """Whether a block neither leaves early nor gives values that later code uses."""
    items = [item for statement in node.body for item in walk(statement)]
    if any(isinstance(item, (ast.Return, ast.Yield, ast.Break, ast.Continue)) for item in items):
        return False
    stored = {item.id for item in items if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
    around = file.names.function_of(node) or file.tree
    inside, scope = set(items), file.names.scope_of(node)
    return not any(
        isinstance(item, ast.Name)
        and item.id in stored
        and isinstance(item.ctx, ast.Load)
        and item not in inside
        and (found := file.names.lookup(item.id, file.names.scope_of(item))) is not None
        and found[0] is scope
        and not _is_bound_since(file, item, node)
        for item in walk(around)
    )


def _is_bound_since(file: File, name: ast.Name, block: ast.With) -> bool:
    """Whether a name has another value than the block's wherever it is read here: it is bound between the two."""
    child: ast.AST = name
    for parent in file.names.ancestors(name):
        if isinstance(child, ast.stmt):
            before = file.names.siblings(child)
            for statement in reversed(before[: before.index(child)]):
                if block in walk(statement):
                    return False
                if _binds(statement, name.id):
                    return True
        if isinstance(parent, ast.With) and parent is not block and _binds(parent, name.id):
            return True
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            return False
        child = parent
    return False


def _binds(statement: ast.stmt, name: str) -> bool:
    """Whether a statement certainly gives a name a value."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.With):
        targets = [item.optional_vars for item in statement.items if item.optional_vars is not None]
        if any(_binds(inner, name) for inner in statement.body):
            return True
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _runs_everywhere(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call in an opened guard is right on every rank: other rules see to it, or it has no outside effect."""
    name = dotted(call.func) or ""
    if facts.project.external(file, call.func) in {"torch.save", "gc.collect", "torch.cuda.empty_cache"}:
        return True
    if isinstance(call.func, ast.Attribute) and _is_another_on_one_rank(file, facts, call.func.value):
        return False
    return name.split(".")[-1] in _EVERYWHERE or name.startswith("bmt.") or _changes_what_decides(file, call)


def _changes_what_decides(file: File, call: ast.Call) -> bool:
    """Whether a call changes a list that a test of the same function asks: ``while queue: queue.pop()``."""
    match call.func:
        case ast.Attribute(value=ast.Name(id=held), attr=name) if name in _CHANGE_A_LIST:
            around = walk(file.names.function_of(call) or file.tree)
            tests = [node.test for node in around if isinstance(node, (ast.If, ast.While))]
            return any(isinstance(item, ast.Name) and item.id == held for test in tests for item in walk(test))
    return False


def _is_another_on_one_rank(file: File, facts: Facts, node: ast.expr) -> bool:
    """Whether a name is given another value under a rank guard that stays: ``if main: loader = tqdm(loader)``."""
    found = file.names.lookup(node.id, file.names.scope_of(node)) if isinstance(node, ast.Name) else None
    return found is not None and any(facts.scripts.in_kept_guard(file, binding.node) for binding in found[1])


def written_once(file: File, path: ast.expr) -> tuple[Change, ...]:
    """The file at a path is rank 0's; what other ranks write goes nowhere."""
    return *imports(file, "os"), wrap(path, "{it} if {bmt}.rank() == 0 else os.devnull")


def unused_name(file: File, number: int = 0, count: int = 1) -> str:
    """A name for the ``number``th of ``count`` new values that means nothing in the file yet."""
    base = "value" if count == 1 else f"value_{number + 1}"
    taken = {name for scope in file.names.scopes.values() for name in scope.bindings}
    while base in taken:
        base += "_"
    return base
