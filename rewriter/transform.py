"""Makes a plan's changes: one libcst transformer a file.

Changes are keyed by nodes of the original; what they put in place is made of *updated* nodes, so that a change inside
another is not lost. Only what leads to a change is visited. Statements come and go where their block is left, when
everything inside them is done. No comment gets lost: what would go with its code becomes a line of its own before it.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import libcst as cst

from rewriter.analyze.read.source import Source
from rewriter.changes import (
    Arguments,
    Change,
    Import,
    Insert,
    Keep,
    Remove,
    Replace,
    ReplaceStatement,
    StatementChange,
    Template,
    Unblock,
    Undecorate,
    Under,
    nodes,
)
from rewriter.link import Links
from rewriter.types import ConflictError
from rewriter.write import AND, ATOM, BARE, NOT, OR, Holes, Writer, bare, comments, fitting, in_parentheses

_Line = cst.SimpleStatementLine | cst.BaseCompoundStatement
_LINES = (cst.SimpleStatementLine, cst.BaseCompoundStatement)
_SEMICOLON = cst.Semicolon(whitespace_after=cst.SimpleWhitespace(" "))
_HOLDERS = (cst.BaseStatement, cst.ExceptHandler, cst.ExceptStarHandler)
"""What comments are lost from."""


def transformed(
    module: cst.Module,
    body: Sequence[ast.stmt],
    source: Source,
    parents: Mapping[ast.AST, ast.AST],
    changes: Sequence[Change],
    bmt: str,
) -> cst.Module:
    """``module`` with the changes of ``body``: the same statements of a file, as libcst and as ``ast`` have them.

    ``bmt`` is the file's name for bmtrain.

    Raises:
        ConflictError: changes that cannot be made together, or of code that is not found.
    """
    wanted = [node for change in changes for node in nodes(change)]
    links = Links(body, module, parents, source.place, wanted)
    write = Writer(bmt, source.indent_unit if source.indent_unit != module.default_indent else None)
    result = module.visit(_Apply(links, parents, changes, write))
    assert isinstance(result, cst.Module)
    return result


@dataclass(eq=False)
class _Piece:
    """A statement on its way: what it has become, and what stands before and behind it."""

    lead: list[cst.EmptyLine]
    core: list[_Line]
    before: list[_Line] = field(default_factory=list)
    behind: list[_Line] = field(default_factory=list)
    under: list[Under] = field(default_factory=list)
    gap: list[cst.EmptyLine] = field(default_factory=list)  # between what stands before and the statement
    left: list[cst.EmptyLine] = field(default_factory=list)  # comments that follow

    def lines(self) -> tuple[list[_Line], list[cst.EmptyLine]]:
        """The statements, and lines that belong to whatever comes next."""
        rest = [*self.core, *self.behind]
        if self.gap and rest:
            rest[0] = rest[0].with_changes(leading_lines=[*self.gap, *rest[0].leading_lines])
        found = [*self.before, *rest]
        if not found:
            return [], [*self.lead, *self.left]
        if not self.lead:
            return found, self.left
        own = found[0].leading_lines
        return [found[0].with_changes(leading_lines=[*self.lead, *own]), *found[1:]], self.left


def _in_order(pieces: Sequence[_Piece]) -> tuple[list[_Line], list[cst.EmptyLine]]:
    """The statements of neighbours, and comment lines that nothing comes behind."""
    found: list[_Line] = []
    waiting: list[cst.EmptyLine] = []
    for piece in pieces:
        lines, left = piece.lines()
        if lines and waiting:
            lines = [lines[0].with_changes(leading_lines=[*waiting, *lines[0].leading_lines]), *lines[1:]]
            waiting = []
        found.extend(lines)
        waiting = [*waiting, *left]
    return found, waiting


class _Apply(cst.CSTTransformer):
    def __init__(
        self, links: Links, parents: Mapping[ast.AST, ast.AST], changes: Sequence[Change], write: Writer
    ) -> None:
        super().__init__()
        self._links, self._parents, self._write = links, parents, write
        self._of_expressions: dict[cst.CSTNode, list[Replace | Arguments]] = defaultdict(list)
        self._of_statements: dict[cst.CSTNode, list[StatementChange]] = defaultdict(list)
        self._hoisted: dict[cst.CSTNode, str] = {}
        for change in changes:
            match change:
                case Replace(node=node):
                    self._of_expressions[links.expressions[node]].append(change)
                case Arguments(node=ast.ClassDef() as node):
                    self._of_expressions[links.statements[node]].append(change)
                case Arguments(node=ast.Call() as node):
                    self._of_expressions[links.expressions[node]].append(change)
                case Under(statements=(first, *_), hoisted=hoisted):
                    self._of_statements[links.statements[first]].append(change)
                    self._hoisted.update((links.expressions[node], name) for name, node in hoisted)
                case Insert() | Remove() | ReplaceStatement() | Keep() | Unblock() | Undecorate():
                    self._of_statements[links.statements[change.statement]].append(change)
                case Import():
                    raise AssertionError("the plan says where imports go")
        self._wanted: set[cst.CSTNode] = set(links.expressions.values())
        self._updated: dict[cst.CSTNode, cst.CSTNode] = {}
        self._lost: list[Counter[str]] = []  # comments, by the statement being visited
        self._comments: dict[cst.CSTNode, Counter[str]] = {}
        self._made: dict[cst.CSTNode, _Piece] = {}  # what lines have become

    # Which nodes are visited -------------------------------------------------------------------------------------

    def on_visit(self, node: cst.CSTNode) -> bool:
        if node not in self._links.spine:
            return False
        if isinstance(node, _HOLDERS):
            self._lost.append(Counter())
        return True

    def on_leave(  # type: ignore[override]
        self, original_node: cst.CSTNode, updated_node: cst.CSTNode
    ) -> cst.CSTNode:
        current = updated_node
        if original_node not in self._links.spine:
            return current
        if isinstance(original_node, _HOLDERS):
            self._comments[original_node] = self._lost.pop()
        if isinstance(original_node, cst.FormattedString):
            assert isinstance(current, cst.FormattedString)
            pairs = zip(original_node.parts, current.parts, strict=True)
            parts = [part for one, other in pairs for part in _named_as_before(one, other, original_node.quote)]
            current = current.with_changes(parts=parts)
        for change in self._of_expressions.get(original_node, ()):
            current = self._changed(original_node, current, change)
        if original_node in self._wanted:
            self._updated[original_node] = current
        if original_node in self._hoisted:
            return cst.Name(self._hoisted[original_node])
        if isinstance(original_node, (cst.Module, cst.IndentedBlock)):
            assert isinstance(current, (cst.Module, cst.IndentedBlock))
            return self._block(original_node, current)
        if isinstance(original_node, (cst.SimpleStatementLine, cst.SimpleStatementSuite)):
            if len(original_node.body) > 1 or isinstance(original_node, cst.SimpleStatementSuite):
                assert isinstance(current, (cst.SimpleStatementLine, cst.SimpleStatementSuite))
                current = self._shared_line(original_node, current)
            if isinstance(current, cst.SimpleStatementSuite):
                self._made[original_node] = _Piece([], _opened_suite(current))
        elif original_node in self._links.elifs and original_node in self._of_statements:
            raise ConflictError("an elif cannot be changed as a statement")
        return current

    # Expressions -------------------------------------------------------------------------------------------------

    def _holes(self, code: Template, own: cst.CSTNode | None = None, it: cst.CSTNode | None = None) -> Holes:
        """What goes into a template's holes; ``it`` for the node ``own`` that is being changed."""
        found: dict[str, cst.BaseExpression] = {}
        for name, node in code.holes:
            linked = self._links.expressions[node]
            value = it if linked is own else self._updated.get(linked, linked)
            assert isinstance(value, cst.BaseExpression)
            found[name] = value
        return found

    def _changed(self, original: cst.CSTNode, current: cst.CSTNode, change: Replace | Arguments) -> cst.CSTNode:
        result = (
            self._replaced(original, current, change)
            if isinstance(change, Replace)
            else self._with_arguments(current, change)
        )
        if change.node.lineno != change.node.end_lineno and not isinstance(change.node, ast.ClassDef):
            self._lost[-1] += comments(current) - comments(result)
        return result

    def _replaced(self, original: cst.CSTNode, current: cst.CSTNode, change: Replace) -> cst.CSTNode:
        assert isinstance(current, cst.BaseExpression)
        result = self._write.expression(change.by, self._holes(change.by, original, current))
        parentheses_are_its_own = isinstance(current, (cst.Tuple, cst.GeneratorExp))
        if not current.lpar or parentheses_are_its_own:
            return self._fitting(change.node, result)
        inner = bare(result)
        return inner.with_changes(lpar=[*current.lpar, *inner.lpar], rpar=[*inner.rpar, *current.rpar])

    def _fitting(self, node: ast.expr, result: cst.BaseExpression) -> cst.BaseExpression:
        """What takes an expression's place, in parentheses if it needs them there."""
        match self._parents[node]:
            case ast.Call(func=func) if func is not node:
                return bare(result)
            case (
                ast.keyword()
                | ast.Tuple()
                | ast.List()
                | ast.Set()
                | ast.Dict()
                | ast.DictComp()
                | ast.FormattedValue()
            ):
                return bare(result)
            case ast.stmt() | ast.withitem():
                return fitting(result, BARE)
            case ast.IfExp():
                return fitting(result, OR)
            case ast.BoolOp(op=operator):
                return fitting(result, AND if isinstance(operator, ast.Or) else NOT)
        return fitting(result, ATOM)

    def _with_arguments(self, node: cst.CSTNode, change: Arguments) -> cst.CSTNode:
        new = [self._write.argument(code, self._holes(code)) for code in change.added]
        if isinstance(change.node, ast.ClassDef):
            assert isinstance(node, cst.ClassDef)
            assert not change.dropped and not change.unstarred
            return node.with_changes(bases=_extended(node.bases, new))
        assert isinstance(node, cst.Call)
        given: list[ast.expr | ast.keyword] = [*change.node.args, *change.node.keywords]
        given.sort(key=lambda item: (item.lineno, item.col_offset))
        # Changes before this one may have added arguments at the end.
        kept = [
            arg.with_changes(star="", whitespace_after_star=cst.SimpleWhitespace(""))
            if item in change.unstarred
            else arg
            for item, arg in zip(given, node.args, strict=False)
            if item not in change.dropped
        ]
        kept += node.args[len(given) :]
        last = node.args[-1] if node.args else None
        if kept and last is not None and kept[-1].comma != last.comma:  # a trailing comma or none, as before
            kept[-1] = kept[-1].with_changes(comma=last.comma, whitespace_after_arg=last.whitespace_after_arg)
        if change.first is not None:
            comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")) if kept else cst.MaybeSentinel.DEFAULT
            kept.insert(0, self._write.argument(change.first, self._holes(change.first)).with_changes(comma=comma))
        return node.with_changes(args=_extended(kept, new))

    # Statements --------------------------------------------------------------------------------------------------

    def _block(
        self, original: cst.Module | cst.IndentedBlock, updated: cst.Module | cst.IndentedBlock
    ) -> cst.Module | cst.IndentedBlock:
        """A block with its statements changed, when all blocks inside are."""
        if not any(line in self._links.spine for line in original.body):
            return updated
        pieces = [self._piece(before, after) for before, after in zip(original.body, updated.body, strict=True)]
        tops: list[_Piece] = []
        index = 0
        while index < len(pieces):
            piece, count = pieces[index], 1
            for change in piece.under:
                followers = pieces[index + count : index + len(change.statements)]
                piece.core = [self._under(change, piece, followers)]
                count = max(count, len(change.statements))
            self._made[original.body[index]] = piece
            tops.append(piece)
            index += count
        body, waiting = _in_order(tops)
        if not body and isinstance(updated, cst.IndentedBlock):
            body = [cst.SimpleStatementLine(body=[cst.Pass()], leading_lines=waiting)]
            waiting = []
        return updated.with_changes(body=body, footer=[*waiting, *updated.footer])

    def _piece(self, original: cst.BaseStatement, updated: cst.BaseStatement) -> _Piece:
        assert isinstance(updated, _LINES)
        if original not in self._links.spine:
            return _Piece([], [updated])
        unit: cst.CSTNode = original
        if isinstance(original, cst.SimpleStatementLine):
            if len(original.body) > 1:  # what shares its line is changed within it
                return self._with_lost(self._beside_shared(original, updated), self._comments[original])
            unit = original.body[0]
        changes = self._of_statements.get(unit, [])
        piece = _Piece(list(updated.leading_lines), [updated.with_changes(leading_lines=[])])
        for change in changes:
            match change:
                case Insert(lines=lines, behind=behind):
                    made = self._write.statements(lines, self._all_holes(lines))
                    if behind:
                        piece.behind.extend(made)
                    else:
                        piece.before.extend(made)
                        piece.gap = _blank_lines_at_end(lines)
                case Remove():
                    piece.core = []
                case ReplaceStatement(by=by, moved=moved):
                    made = self._write.statements([by], self._holes(by))
                    piece.core = list(made) if moved else [_with_end_of(updated, line) for line in made]
                    if moved and isinstance(body := getattr(updated, "body", None), cst.IndentedBlock):
                        piece.left = list(body.footer)
                case Keep(kept=kept):
                    piece.core, _ = self._made[self._links.lines[kept]].lines()
                case Unblock():
                    piece.core, piece.left = _opened(updated)
                case Undecorate(decorator=decorator):
                    piece.core = [self._undecorated(unit, line, decorator) for line in piece.core]
                case Under():
                    piece.under.append(change)
        if any(_may_lose_comments(change) for change in changes):
            stay = comments(*piece.core, *piece.left)
            self._with_lost(piece, comments(updated.with_changes(leading_lines=[])) - stay)
        return self._with_lost(piece, self._comments[original])

    def _undecorated(self, original: cst.CSTNode, line: _Line, decorator: ast.expr) -> _Line:
        """A function without the decorator that this expression is."""
        assert isinstance(original, cst.FunctionDef)
        gone = self._links.expressions[decorator]
        assert isinstance(line, cst.FunctionDef)
        kept, above = list[cst.Decorator](), list[cst.EmptyLine]()
        for before, item in zip(original.decorators, line.decorators, strict=True):
            above.extend(item.leading_lines)
            if before.decorator is gone:
                above.extend(cst.EmptyLine(comment=cst.Comment(text)) for text in comments(item.trailing_whitespace))
            else:
                kept.append(item.with_changes(leading_lines=above))
                above = []
        return line.with_changes(decorators=kept, lines_after_decorators=[*above, *line.lines_after_decorators])

    def _beside_shared(self, original: cst.SimpleStatementLine, updated: _Line) -> _Piece:
        """A line that statements share, with the lines that do not fit into it before and behind it."""
        piece = _Piece([], [updated])
        for small in original.body:
            for change in self._of_statements.get(small, ()):
                if isinstance(change, Insert) and self._stands_apart(original, small, change):
                    made = self._write.statements(change.lines, self._all_holes(change.lines))
                    (piece.behind if change.behind else piece.before).extend(made)
        if piece.before:
            piece.lead = list(updated.leading_lines)
            piece.core = [updated.with_changes(leading_lines=[])]
        return piece

    def _stands_apart(
        self, original: cst.SimpleStatementLine | cst.SimpleStatementSuite, small: cst.CSTNode, change: Insert
    ) -> bool:
        """Whether lines get lines of their own: at the end of a line that statements share, where one is a block."""
        at_end = small is (original.body[-1] if change.behind else original.body[0])
        if not at_end or not isinstance(original, cst.SimpleStatementLine):
            return False
        made = self._write.statements(change.lines, self._all_holes(change.lines))
        return not all(isinstance(line, cst.SimpleStatementLine) for line in made)

    @staticmethod
    def _with_lost(piece: _Piece, lost: Counter[str]) -> _Piece:
        piece.lead.extend(cst.EmptyLine(comment=cst.Comment(text)) for text in lost.elements())
        return piece

    def _all_holes(self, lines: Sequence[Template]) -> Holes:
        return {name: node for line in lines for name, node in self._holes(line).items()}

    def _under(self, change: Under, piece: _Piece, followers: Sequence[_Piece]) -> cst.BaseCompoundStatement:
        inner, waiting = _in_order(followers)
        for name, node in change.hoisted:
            value = self._updated[self._links.expressions[node]]
            assert isinstance(value, cst.BaseExpression)
            code = Template(f"{name} = {{value}}", (("value", node),))
            piece.before.extend(self._write.statements([code], {"value": value}))
        head = self._write.head(change.head, self._holes(change.head))
        return head.with_changes(
            body=cst.IndentedBlock(body=[*piece.core, *inner], footer=waiting, indent=self._write.indent)
        )

    def _shared_line(
        self,
        original: cst.SimpleStatementLine | cst.SimpleStatementSuite,
        updated: cst.SimpleStatementLine | cst.SimpleStatementSuite,
    ) -> cst.SimpleStatementLine | cst.SimpleStatementSuite:
        """Statements that share a line, between semicolons or behind a colon."""
        body: list[cst.BaseSmallStatement] = []
        for before, after in zip(original.body, updated.body, strict=True):
            front: list[cst.BaseSmallStatement] = []
            core: list[cst.BaseSmallStatement] = [after]
            behind: list[cst.BaseSmallStatement] = []
            for change in self._of_statements.get(before, ()):
                if isinstance(change, Insert):
                    if not self._stands_apart(original, before, change):
                        made = self._write.statements(change.lines, self._all_holes(change.lines))
                        (behind if change.behind else front).extend(_small(line, change.statement) for line in made)
                elif isinstance(change, Remove):
                    core = [cst.Pass()]
                elif isinstance(change, ReplaceStatement):
                    made = self._write.statements([change.by], self._holes(change.by))
                    core = [_small(line, change.statement) for line in made]
                else:
                    raise ConflictError("a statement that shares its line cannot move: give it a line of its own")
            body.extend([*front, *core, *behind])
        if len(body) == len(updated.body) and all(new is old for new, old in zip(body, updated.body, strict=True)):
            return updated
        last = updated.body[-1].semicolon
        joined = [small.with_changes(semicolon=_between(small)) for small in body[:-1]]
        return updated.with_changes(body=[*joined, body[-1].with_changes(semicolon=last)])


def _between(small: cst.BaseSmallStatement) -> cst.Semicolon:
    return small.semicolon if isinstance(small.semicolon, cst.Semicolon) else _SEMICOLON


def _small(line: cst.CSTNode, at: ast.stmt) -> cst.BaseSmallStatement:
    if not isinstance(line, cst.SimpleStatementLine) or len(line.body) != 1:
        raise ConflictError(f"give each statement of line {at.lineno} a line of its own, as a block comes beside it")
    return line.body[0]


def _with_end_of(old: _Line, new: _Line) -> _Line:
    """A line of code that takes a statement's place takes the end of its last line, too."""
    last: cst.CSTNode = old
    while isinstance(last, (cst.For, cst.While, cst.If, cst.With)):
        last = last.body
        if isinstance(last, cst.IndentedBlock):
            last = last.body[-1]
    if isinstance(new, cst.SimpleStatementLine) and isinstance(
        last, (cst.SimpleStatementLine, cst.SimpleStatementSuite)
    ):
        return new.with_changes(trailing_whitespace=last.trailing_whitespace)
    return new


def _may_lose_comments(change: StatementChange) -> bool:
    if isinstance(change, ReplaceStatement):
        return not change.moved
    return isinstance(change, (Remove, Keep, Unblock))


def _blank_lines_at_end(lines: Sequence[Template]) -> list[cst.EmptyLine]:
    blank = takewhile(lambda line: not line.text.strip(), reversed(lines))
    return [cst.EmptyLine(indent=False) for _ in blank]


def _opened(statement: _Line) -> tuple[list[_Line], list[cst.EmptyLine]]:
    """The statements of a block, and the comment lines at its end."""
    assert isinstance(statement, (cst.If, cst.With))
    body = statement.body
    if isinstance(body, cst.IndentedBlock):
        return [line for line in body.body if isinstance(line, _LINES)], list(body.footer)
    assert isinstance(body, cst.SimpleStatementSuite)
    return _opened_suite(body), []


def _opened_suite(suite: cst.SimpleStatementSuite) -> list[_Line]:
    return [cst.SimpleStatementLine(body=suite.body, trailing_whitespace=suite.trailing_whitespace)]


def _extended(given: Sequence[cst.Arg], new: Sequence[cst.Arg]) -> list[cst.Arg]:
    """Arguments with others behind, which take over the end of the last: a trailing comma, a line break."""
    arguments = list(given)
    for argument in new:
        if arguments:
            last = arguments[-1]
            value = last.value
            if isinstance(value, cst.GeneratorExp) and not value.lpar:  # it shares its parentheses with the call
                value = in_parentheses(value)
            comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
            arguments[-1] = last.with_changes(value=value, comma=comma, whitespace_after_arg=cst.SimpleWhitespace(""))
            argument = argument.with_changes(comma=last.comma, whitespace_after_arg=last.whitespace_after_arg)
        arguments.append(argument)
    return arguments


def _named_as_before(
    original: cst.BaseFormattedStringContent, updated: cst.BaseFormattedStringContent, quote: str
) -> list[cst.BaseFormattedStringContent]:
    """``{loss=}`` goes on saying "loss=", whatever stands in its place."""
    write = cst.Module([]).code_for_node
    if not isinstance(original, cst.FormattedStringExpression) or original.equal is None:
        return [updated]
    assert isinstance(updated, cst.FormattedStringExpression)
    spaced = (original.whitespace_before_expression, original.expression, original.whitespace_after_expression)
    name = "".join(map(write, (*spaced, original.equal)))
    if write(original.expression) == write(updated.expression) or quote in name or "\\" in name or "\n" in name:
        return [updated]
    shown = updated.with_changes(
        equal=None,
        whitespace_before_expression=cst.SimpleWhitespace(""),
        whitespace_after_expression=cst.SimpleWhitespace(""),
        conversion="r" if updated.conversion is None and updated.format_spec is None else updated.conversion,
    )
    return [cst.FormattedStringText(name.replace("{", "{{").replace("}", "}}")), shown]
