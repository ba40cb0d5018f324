"""What rules say about a file: changes. Frozen, printable, without positions and without libcst.

A change is keyed by nodes of the file's own ``ast``. Code to write is a template: ``{name}`` in it is a hole, which
receives the code of an ``ast`` node of the same file *as it is after every other change inside it*, so that nested
changes compose; ``{bmt}`` is whatever the file calls bmtrain, and asks for the import. Several changes of one node
apply in the order of their rules, the first innermost.

    replace(call, "{bmt}.scale_loss({loss}).backward()", loss=call.func.value)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

HOLE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True)
class Template:
    """Code with holes. Other braces stand for themselves."""

    text: str
    holes: tuple[tuple[str, ast.expr], ...] = ()

    def __post_init__(self) -> None:
        names = {name for name, _ in self.holes}
        assert names <= set(HOLE.findall(self.text)), f"{self.text!r} has no hole for {sorted(names)}"

    @property
    def uses_bmt(self) -> bool:
        return "{bmt}" in self.text

    def __str__(self) -> str:
        return HOLE.sub(lambda match: _code(dict(self.holes).get(match[1])) or match[0], self.text)


def template(text: str, **holes: ast.expr) -> Template:
    return Template(text, tuple(holes.items()))


@dataclass(frozen=True, slots=True)
class Replace:
    """An expression becomes other code. A hole for the expression itself wraps it.

    Parentheses around the expression in the source stay around what takes its place.
    """

    node: ast.expr
    by: Template

    def __str__(self) -> str:
        return f"{_place(self.node)}: {_code(self.node)} -> {self.by}"


@dataclass(frozen=True, slots=True)
class Arguments:
    """A call, or a class statement, gets arguments at the end, or one in front, loses some, or loses the star of some.

    ``dropped`` are positional arguments or keywords of the call; ``unstarred`` arguments ``*x`` that become ``x``.
    """

    node: ast.Call | ast.ClassDef
    added: tuple[Template, ...] = ()
    dropped: tuple[ast.expr | ast.keyword, ...] = ()
    unstarred: tuple[ast.Starred, ...] = ()
    first: Template | None = None

    def __str__(self) -> str:
        words = [f"{item}, ..." for item in (self.first,) if item is not None]
        words += [f"+{item}" for item in self.added] + [f"-{ast.unparse(item)}" for item in self.dropped]
        words += [f"{_code(item)} without its star" for item in self.unstarred]
        return f"{_place(self.node)}: arguments {', '.join(words)}"


@dataclass(frozen=True, slots=True)
class Insert:
    """New statements, in front of a statement or behind it, at its indentation.

    ``lines`` are lines of code; deeper ones are indented by four spaces a level, whatever the file does.
    """

    statement: ast.stmt
    lines: tuple[Template, ...]
    behind: bool = False

    def __str__(self) -> str:
        where = "behind" if self.behind else "before"
        return f"{where} {_place(self.statement)}: {'; '.join(map(str, self.lines))}"


@dataclass(frozen=True, slots=True)
class Remove:
    """A statement goes, its comments stay; ``pass`` takes its place where it shares its line or its block is empty."""

    statement: ast.stmt

    def __str__(self) -> str:
        return f"{_place(self.statement)}: {_head(self.statement)} goes"


@dataclass(frozen=True, slots=True)
class ReplaceStatement:
    """One line of code takes a statement's place. ``moved`` says that another change takes its comments along."""

    statement: ast.stmt
    by: Template
    moved: bool = False

    def __str__(self) -> str:
        return f"{_place(self.statement)}: {_head(self.statement)} -> {self.by}"


@dataclass(frozen=True, slots=True)
class Keep:
    """Of a compound statement only one statement inside it stays, in its place."""

    statement: ast.stmt
    kept: ast.stmt

    def __str__(self) -> str:
        return f"{_place(self.statement)}: {_head(self.statement)} -> {_head(self.kept)}"


@dataclass(frozen=True, slots=True)
class Unblock:
    """The statements of a compound statement's body take its place. It has no other branch."""

    statement: ast.If | ast.With

    def __str__(self) -> str:
        return f"{_place(self.statement)}: {_head(self.statement)} opens"


@dataclass(frozen=True, slots=True)
class Undecorate:
    """A function loses one of its decorators."""

    statement: ast.FunctionDef | ast.AsyncFunctionDef
    decorator: ast.expr

    def __str__(self) -> str:
        return f"{_place(self.decorator)}: @{_code(self.decorator)} goes"


@dataclass(frozen=True, slots=True)
class Under:
    """Neighbouring statements go under the head of a compound statement, ``if {bmt}.rank() == 0:``.

    ``hoisted`` are expressions inside them that are evaluated before, each under a new name.
    """

    statements: tuple[ast.stmt, ...]
    head: Template
    hoisted: tuple[tuple[str, ast.expr], ...] = ()

    def __str__(self) -> str:
        names = "".join(f"{name} = {_code(node)}; " for name, node in self.hoisted)
        return f"{_place(self.statements[0])}: {names}{self.head} {'; '.join(map(_head, self.statements))}"


@dataclass(frozen=True, slots=True)
class Import:
    """A line among the imports at the top of the file, such as ``import contextlib``."""

    line: str

    def __str__(self) -> str:
        return f"at the top: {self.line}"


StatementChange = Insert | Remove | ReplaceStatement | Keep | Unblock | Undecorate | Under
Change = Replace | Arguments | StatementChange | Import


def replace(node: ast.expr, text: str, **holes: ast.expr) -> Replace:
    return Replace(node, template(text, **holes))


def wrap(node: ast.expr, text: str, **holes: ast.expr) -> Replace:
    """``{it}`` in the text is the expression itself."""
    return Replace(node, template(text, it=node, **holes))


def insert_before(statement: ast.stmt, *lines: str, **holes: ast.expr) -> Insert:
    return Insert(statement, _lines(lines, holes))


def insert_behind(statement: ast.stmt, *lines: str, **holes: ast.expr) -> Insert:
    return Insert(statement, _lines(lines, holes), behind=True)


def _lines(lines: tuple[str, ...], holes: dict[str, ast.expr]) -> tuple[Template, ...]:
    given = [{name: holes[name] for name in HOLE.findall(line) if name in holes} for line in lines]
    return tuple(template(line, **own) for line, own in zip(lines, given, strict=True))


def anchor(change: Change) -> ast.stmt | ast.expr | None:
    """The node that a change is keyed by; None for an import."""
    match change:
        case Replace(node=node) | Arguments(node=node):
            return node
        case Under(statements=(first, *_)):
            return first
        case Import():
            return None
    assert not isinstance(change, Under)
    return change.statement


def nodes(change: Change) -> Iterator[ast.stmt | ast.expr]:
    """All nodes that must be found for a change; arguments are found in their call."""
    match change:
        case Under(statements=several, hoisted=hoisted):
            yield from several
            yield from (node for _, node in hoisted)
        case Keep(statement=statement, kept=kept):
            yield from (statement, kept)
        case Undecorate(statement=statement, decorator=decorator):
            yield from (statement, decorator)
        case _:
            node = anchor(change)
            if node is not None:
                yield node
    for code in templates(change):
        yield from (node for _, node in code.holes)


def templates(change: Change) -> Iterator[Template]:
    """All code that a change writes."""
    match change:
        case Replace(by=by) | ReplaceStatement(by=by) | Under(head=by):
            yield by
        case Arguments(added=lines, first=first):
            yield from lines if first is None else (first, *lines)
        case Insert(lines=lines):
            yield from lines


def uses_bmt(change: Change) -> bool:
    """Whether a change needs bmtrain to be imported."""
    return any(item.uses_bmt for item in templates(change))


def _place(node: ast.stmt | ast.expr) -> str:
    return f"{node.lineno}:{node.col_offset}"


def _code(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)


def _head(statement: ast.stmt) -> str:
    return ast.unparse(statement).partition("\n")[0]
