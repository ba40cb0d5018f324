"""A file's bytes with its plan's changes made, or the reason why they are left as they are."""

from __future__ import annotations

import ast
import io
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import libcst as cst

from rewriter.analyze.read.file import File
from rewriter.analyze.read.source import Source
from rewriter.changes import Arguments, Change, Insert, Replace, Undecorate, Under, anchor, nodes
from rewriter.plan import Plan
from rewriter.transform import transformed
from rewriter.types import ConflictError, InputError

T = TypeVar("T")

_STACK = 512 * 1024 * 1024


def rewritten(file: File, plan: Plan) -> bytes:
    """The file's bytes after the plan, in its own encoding.

    Raises:
        InputError: libcst cannot read the file, would print it otherwise than it is written, or the result is no
            Python. The message is the reason.
    """
    changed = touched(file, plan.changes)
    try:
        text = _code(file, plan, changed)
    except RecursionError:
        text = _with_room(lambda: _code(file, plan, changed))
    lost = _lost_line(file, changed, text)
    if lost:
        raise InputError(f"line {lost} would not be printed as it is written")
    after = file.source.encode(text.encode("utf-8"))
    try:
        _ = Source(file.path, after).tree
    except InputError as error:
        raise InputError(f"the result is no Python: {error}") from None
    return after


def changed_module(file: File, plan: Plan, module: cst.Module) -> cst.Module:
    """The file as libcst has parsed it, with the plan's changes.

    Raises:
        InputError: the changes cannot be made.
    """
    try:
        return transformed(module, file.tree.body, file.source, file.names.parents, plan.changes, plan.bmt)
    except (ConflictError, cst.CSTValidationError) as error:
        raise InputError(" ".join(str(error).split())) from None


def _code(file: File, plan: Plan, changed: set[int]) -> str:
    """The file's text after the plan. Statements at its top that no change needs are not even parsed by libcst.

    ``changed`` are the lines that may be printed anew.
    """
    body, lines = file.tree.body, list(_texts(file.source.text))
    pieces: list[str] = []
    done = 0
    for first, last, changes in _runs(file, plan.changes, lines):
        start = _first_line(body[first], lines)
        end = _first_line(body[last + 1], lines) if last + 1 < len(body) else len(lines)
        pieces += lines[done:start]
        written = lines[start:end]
        readable = _readable(written)
        odd = {number for number in range(len(written)) if written[number] != readable[number]}
        if strange := [start + number + 1 for number in sorted(odd) if start + number + 1 in changed]:
            raise InputError(f"line {strange[0]} is indented in a way that libcst does not read")
        try:
            module = cst.parse_module("".join(readable))
            run = body[first : last + 1]
            code = transformed(module, run, file.source, file.names.parents, changes, plan.bmt).code
            pieces.append(_as_written(code, written, readable, odd) if odd else code)
        except (cst.ParserSyntaxError, cst.CSTValidationError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"libcst, from line {start + 1}: {reason}") from None
        except (ConflictError, UnicodeError) as error:
            raise InputError(str(error)) from None
        done = end
    return "".join([*pieces, *lines[done:]])


def _runs(file: File, changes: Sequence[Change], lines: Sequence[str]) -> Iterator[tuple[int, int, list[Change]]]:
    """Neighbouring statements at the top of the file that changes need, as first and last, with those changes."""
    body = file.tree.body
    numbers: dict[ast.AST, int] = {statement: number for number, statement in enumerate(body)}
    spans: list[tuple[int, int, int]] = []
    for order, change in enumerate(changes):
        needed = [numbers[file.names.top_of(node)] for node in nodes(change)]
        spans.append((min(needed), max(needed), order))
    found: list[tuple[int, int, list[int]]] = []
    for first, last, order in sorted(spans):
        while first and _first_line(body[first], lines) < (body[first - 1].end_lineno or 0):
            first -= 1  # they share a line
        while last + 1 < len(body) and _first_line(body[last + 1], lines) < (body[last].end_lineno or 0):
            last += 1
        if found and first <= found[-1][1] + 1:
            begin, end, before = found.pop()
            found.append((begin, max(end, last), [*before, order]))
        else:
            found.append((first, last, [order]))
    for first, last, orders in found:
        yield first, last, [changes[order] for order in sorted(orders)]


def _first_line(statement: ast.stmt, lines: Sequence[str]) -> int:
    """Index of a statement's first line, decorators included."""
    first = statement.lineno - 1
    decorators = getattr(statement, "decorator_list", [])
    if decorators:
        first = decorators[0].lineno - 1
        while not lines[first].lstrip().startswith("@"):  # a bracket opens between it and the expression
            first -= 1
    return first


def _readable(lines: Sequence[str]) -> list[str]:
    """The lines of statements as libcst reads them: it knows no form feeds, nor tabs beside spaces as indentation."""
    if any(line.endswith("\r") for line in lines):
        raise InputError("lines end with a carriage return alone, which libcst does not read")
    margins = [line[: len(line) - len(line.lstrip(" \t\f"))] for line in lines]
    mixed = any("\t" in margin for margin in margins) and any(" " in margin for margin in margins)
    if mixed:
        try:
            cst.parse_module("".join(lines))
            mixed = False
        except cst.ParserSyntaxError:
            pass
    found = []
    for line, margin in zip(lines, margins, strict=True):
        plain = margin.rpartition("\f")[2]
        found.append((plain.expandtabs() if mixed else plain) + line[len(margin) :] if line.strip() else line)
    return found


def _as_written(code: str, written: Sequence[str], readable: Sequence[str], odd: set[int]) -> str:
    """Code in which lines that are still as libcst read them are as they were written."""
    found = list(_texts(code))
    position = 0
    for number, line in enumerate(readable):
        place = next((i for i in range(position, len(found)) if found[i] == line), None)
        if place is not None:
            if number in odd:
                found[place] = written[number]
            position = place + 1
    return "".join(found)


def _with_room(work: Callable[[], T]) -> T:
    """Deeply nested code needs more of Python's stack than it has."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except RecursionError:
            errors.append(InputError("it is nested too deeply"))
        except BaseException as error:
            errors.append(error)

    limit, size = sys.getrecursionlimit(), threading.stack_size(_STACK)
    sys.setrecursionlimit(100_000)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(size)
    if errors:
        raise errors[0]
    return results[0]


# The guard -------------------------------------------------------------------------------------------------------


def _lost_line(file: File, changed: set[int], text: str) -> int:
    """The first line that no change touches and that is not in the result, in its order; 0 if there is none."""
    rest = _texts(text)
    for number, line in enumerate(_texts(file.source.text), 1):
        if number in changed or not line.strip():
            continue
        if not any(other == line or other.rstrip("\r\n") == line for other in rest):
            return number
    return 0


def touched(file: File, changes: Iterable[Change]) -> set[int]:
    """The lines that changes may print anew; all others are in the result as they were."""
    return {line for change in changes for line in _lines(file, change)}


def _texts(text: str) -> Iterator[str]:
    """Lines with their ends."""
    return iter(io.StringIO(text, newline=""))


def _lines(file: File, change: Change) -> Iterator[int]:
    node = anchor(change)
    assert node is not None and node.end_lineno is not None
    statement = file.names.statement_of(node)
    assert statement.end_lineno is not None
    first, last = statement.lineno, statement.end_lineno
    if isinstance(change, Undecorate):
        yield from range(change.decorator.lineno, (change.decorator.end_lineno or change.decorator.lineno) + 1)
    elif isinstance(change, Insert):
        if not file.source.owns_lines(statement):
            yield from range(first, last + 1)
    elif isinstance(change, (Replace, Arguments)):
        body = getattr(statement, "body", None)
        yield from range(first, body[0].lineno if isinstance(body, list) and body[0].lineno > first else last + 1)
        yield from range(node.lineno, node.end_lineno + 1)
    else:
        if isinstance(change, Under):
            last = change.statements[-1].end_lineno or last
        yield from range(first, last + 1)
        for number in range(last + 1, file.source.line_count + 1):  # comments at the end of its block
            if file.source.line(number).lstrip()[:1] not in {b"", b"#"}:
                break
            yield number
