"""Where scripts let the first rank through before the others: around what fills a cache, or downloads."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.training.collectives import is_rank_test, lets_first_pass
from rewriter.analyze.training.rank_names import may_know_ranks
from rewriter.analyze.training.scripts import Scripts

_IN_TURN = {
    "bmtrain.rank_0_first", "filelock.FileLock", "filelock.SoftFileLock", "filelock.UnixFileLock",
    "fasteners.InterProcessLock", "portalocker.Lock",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Turn:
    """Statements that ranks run one after the other, each with its file.

    The tests with barriers around them are ``waits``, or they are the body of ``block``, or of a ``with`` for which
    a generator holds ``block`` open.
    """

    body: tuple[tuple[File, ast.stmt], ...]
    waits: tuple[ast.If, ast.If] | None = None
    block: ast.With | None = None


def turns(file: File, scripts: Scripts) -> Iterator[Turn]:
    """``if rank not in [-1, 0]: barrier()``, statements, ``if rank == 0: barrier()``; ``with first_alone(rank):``."""
    for node in file.nodes:
        match node:
            case ast.With(items=[ast.withitem(context_expr=entered, optional_vars=None)], body=body):
                made = file.names.values_of(entered) if isinstance(entered, ast.Name) else [entered]
                if any(isinstance(call, ast.Call) and _is_manager(file, scripts, call) for call in made):
                    yield Turn((*_with(file, body), *_held_open(file, scripts, node)), block=node)
            case ast.If():
                found = _paired(file, scripts, node)
                if found is not None:
                    yield Turn(tuple(_with(file, found[0])), waits=(node, found[1]))


def _with(file: File, statements: Iterable[ast.stmt]) -> Iterator[tuple[File, ast.stmt]]:
    yield from ((file, statement) for statement in statements)


def _held_open(file: File, scripts: Scripts, block: ast.With) -> Iterator[tuple[File, ast.stmt]]:
    """What runs where a generator of the project, entered by ``with``, stands at a ``yield`` in a block."""
    function = file.names.function_of(block)
    if function is None or not function.decorator_list or not any(isinstance(n, ast.Yield) for n in walk(block)):
        return
    for other, call in scripts.collectives.instances.calls(file, function):
        entered = other.names.enclosing(call, (ast.With,))
        if isinstance(entered, ast.With) and any(call is item.context_expr for item in entered.items):
            yield from _with(other, entered.body)


def _paired(file: File, scripts: Scripts, node: ast.If) -> tuple[list[ast.stmt], ast.If] | None:
    """What stands between a test that lets others wait and the one by which the first rank lets them go."""
    if not may_know_ranks(file) or not _only_waits(file, scripts, node) or not lets_first_pass(file, node.test):
        return None
    block = file.names.siblings(node)
    start = block.index(node) + 1
    for number, statement in enumerate(block[start:]):
        if isinstance(statement, ast.If) and _only_waits(file, scripts, statement):
            operands = statement.test.values if isinstance(statement.test, ast.BoolOp) else [statement.test]
            if any(is_rank_test(file, operand) for operand in operands):
                return block[start : start + number], statement
    return None


def _only_waits(file: File, scripts: Scripts, node: ast.If) -> bool:
    return not node.orelse and all(
        isinstance(item, ast.Expr)
        and isinstance(item.value, ast.Call)
        and scripts.collectives.is_barrier(file, item.value)
        for item in node.body
    )


def _is_manager(file: File, scripts: Scripts, call: ast.Call) -> bool:
    """Whether a ``with`` lets one rank through at a time: bmtrain's, a generator of the project, a lock on a file."""
    if scripts.project.external(file, call.func) in _IN_TURN:
        return True
    found = scripts.project.resolve(file, call.func)
    if not isinstance(found, FunctionInfo) or not found.node.decorator_list:
        return False
    return any(
        (pair := _paired(found.file, scripts, node)) is not None
        and any(isinstance(item, ast.Yield) for statement in pair[0] for item in walk(statement))
        for node in found.node.body
        if isinstance(node, ast.If)
    )
