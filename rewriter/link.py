"""Which libcst node a node of ``ast`` is.

Both trees are of the same text. Statements are paired by their order, block by block, and only along the way to those
that are asked for. Expressions are found by their place within their statement: libcst is asked for positions in small
modules that hold one statement without its blocks, because positions in whole files cost more than parsing them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, cast

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper

from rewriter.types import ConflictError

Block: TypeAlias = cst.Module | cst.BaseSuite
Owner: TypeAlias = ast.stmt | ast.ExceptHandler  # what holds expressions of its own
Statement: TypeAlias = cst.BaseSmallStatement | cst.BaseCompoundStatement
_Spans: TypeAlias = dict[cst.CSTNode, tuple[int, int]]

_STUB = cst.IndentedBlock(body=[cst.SimpleStatementLine(body=[cst.Pass()])])
_INCLUDES_PARENTHESES = {ast.Tuple: cst.Tuple, ast.GeneratorExp: cst.GeneratorExp}
"""Expressions whose position in ``ast`` includes the parentheses around them; in libcst none does."""


class Links:
    """The counterparts of ``wanted`` statements and expressions, and of what holds them.

    ``place`` gives the byte offsets of a node of ``ast``, ``parents`` the node that holds it.

    Raises:
        ConflictError: an expression is not found where ``ast`` says that it is.
    """

    def __init__(
        self,
        body: Sequence[ast.stmt],
        module: cst.Module,
        parents: Mapping[ast.AST, ast.AST],
        place: Callable[[ast.expr | Owner], tuple[int, int]],
        wanted: Iterable[ast.stmt | ast.expr],
    ) -> None:
        self.statements: dict[ast.AST, Statement | cst.ExceptHandler | cst.ExceptStarHandler] = {}
        self.lines: dict[ast.AST, cst.CSTNode] = {}
        """The line, the suite or the compound statement that a statement stands in; itself if it is compound."""
        self.expressions: dict[ast.expr, cst.BaseExpression] = {}
        self.spine: set[cst.CSTNode] = set()
        """The wanted nodes, and everything that holds one."""
        self.elifs: set[cst.CSTNode] = set()
        self._module, self._parents, self._place = module, parents, place
        self._margins: dict[ast.AST, str] = {}
        found = list(dict.fromkeys(wanted))
        self._way = {holder for node in found for holder in _upwards(node, parents)}
        self._pair(body, module, "")
        owners: dict[Owner, list[ast.expr]] = {}
        for node in found:
            if isinstance(node, ast.expr):
                owners.setdefault(self._owner(node), []).append(node)
        for owner, nodes in owners.items():
            self._find(owner, nodes)

    def _owner(self, node: ast.AST) -> Owner:
        while not isinstance(node, (ast.stmt, ast.ExceptHandler)):
            node = self._parents[node]
        return node

    # Statements, by their order ----------------------------------------------------------------------------------

    def _pair(self, statements: Sequence[ast.stmt], block: Block, margin: str) -> None:
        if not any(statement in self._way for statement in statements):
            return
        self.spine.add(block)
        if isinstance(block, cst.IndentedBlock):
            margin += self._module.default_indent if block.indent is None else block.indent
        pairs: list[tuple[Statement, cst.CSTNode]] = []
        if isinstance(block, cst.SimpleStatementSuite):
            pairs = [(small, block) for small in block.body]
        else:
            for line in block.body:
                if isinstance(line, cst.SimpleStatementLine):
                    pairs.extend((small, line) for small in line.body)
                else:
                    assert isinstance(line, cst.BaseCompoundStatement)
                    pairs.append((line, line))
        if len(pairs) != len(statements):
            raise ConflictError(f"libcst sees other statements than ast near line {statements[0].lineno}")
        for statement, (found, holder) in zip(statements, pairs, strict=True):
            if statement in self._way:
                self.spine |= {holder, found}
                self._link(statement, found, holder, margin)

    def _link(self, statement: ast.stmt, found: Statement, line: cst.CSTNode, margin: str) -> None:
        self.statements[statement], self.lines[statement] = found, line
        self._margins[statement] = margin
        match statement, found:
            case ast.If(), cst.If():
                self._pair(statement.body, found.body, margin)
                if isinstance(found.orelse, cst.If):
                    if statement.orelse[0] in self._way:
                        self.spine.add(found.orelse)
                        self.elifs.add(found.orelse)
                        self._link(statement.orelse[0], found.orelse, found.orelse, margin)
                elif found.orelse is not None:
                    self._branch(statement.orelse, found.orelse, margin)
            case ((ast.For() | ast.AsyncFor() | ast.While()), (cst.For() | cst.While())):
                self._pair(statement.body, found.body, margin)
                if found.orelse is not None:
                    self._branch(statement.orelse, found.orelse, margin)
            case (
                (ast.With() | ast.AsyncWith() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef()),
                (cst.With() | cst.FunctionDef() | cst.ClassDef()),
            ):
                self._pair(statement.body, found.body, margin)
            case ast.Match(), cst.Match():
                for case, other in zip(statement.cases, found.cases, strict=True):
                    self._branch(case.body, other, margin)
            case _, (cst.Try() | cst.TryStar()):
                attempt = cast(ast.Try, statement)  # or ast.TryStar, which Python 3.10 does not have
                self._pair(attempt.body, found.body, margin)
                branches: Sequence[cst.ExceptHandler | cst.ExceptStarHandler] = found.handlers
                for handler, branch in zip(attempt.handlers, branches, strict=True):
                    if handler in self._way:
                        self.spine.add(branch)
                        self.statements[handler], self._margins[handler] = branch, margin
                        self._pair(handler.body, branch.body, margin)
                if found.orelse is not None:
                    self._branch(attempt.orelse, found.orelse, margin)
                if found.finalbody is not None:
                    self._branch(attempt.finalbody, found.finalbody, margin)

    def _branch(
        self, statements: Sequence[ast.stmt], branch: cst.Else | cst.Finally | cst.MatchCase, margin: str
    ) -> None:
        if any(statement in self._way for statement in statements):
            self.spine.add(branch)
            self._pair(statements, branch.body, margin)

    # Expressions, by their place in the statement ----------------------------------------------------------------

    def _find(self, owner: Owner, nodes: Sequence[ast.expr]) -> None:
        spans = self._spans(owner)
        first, _ = self._place(owner)
        exact = {span: node for node, span in reversed(spans.items()) if isinstance(node, cst.BaseExpression)}
        for node in nodes:
            start, end = (offset - first for offset in self._place(node))
            found: cst.CSTNode | None = exact.get((start, end))
            kind = _INCLUDES_PARENTHESES.get(type(node))
            if kind is not None:
                inside = [
                    (span[1] - span[0], other)
                    for other, span in spans.items()
                    if isinstance(other, kind) and start <= span[0] and span[1] <= end
                ]
                found = max(inside, key=lambda item: item[0])[1] if inside else None
            if not isinstance(found, cst.BaseExpression):
                raise ConflictError(f"{ast.unparse(node)!r} in line {node.lineno} cannot be located")
            self.expressions[node] = found
        self.statements[owner].visit(_Ways({self.expressions[node] for node in nodes}, self.spine))

    def _spans(self, owner: Owner) -> _Spans:
        """Where the nodes of a statement, without its blocks, begin and end, counted from its own beginning."""
        found = self.statements[owner]
        small = isinstance(found, cst.BaseSmallStatement)
        head: cst.CSTNode = found if small else _without_blocks(found)
        body: list[cst.SimpleStatementLine | cst.BaseCompoundStatement]
        if isinstance(head, cst.BaseSmallStatement):
            body = [cst.SimpleStatementLine(body=[head])]
        elif isinstance(head, cst.ExceptHandler):
            body = [cst.Try(body=_STUB, handlers=[head])]
        elif isinstance(head, cst.ExceptStarHandler):
            body = [cst.TryStar(body=_STUB, handlers=[head])]
        elif isinstance(head, cst.If) and found in self.elifs:
            body = [cst.If(test=cst.Name("x"), body=_STUB, orelse=head)]
        else:
            assert isinstance(head, cst.BaseCompoundStatement)
            body = [head]
        if self._margins[owner]:  # lines in parentheses are indented with the block
            block = cst.IndentedBlock(body=body, indent=self._margins[owner])
            body = [cst.If(test=cst.Name("x"), body=block)]
        module = cst.Module(
            body=body, default_indent=self._module.default_indent, default_newline=self._module.default_newline
        )
        spans = MetadataWrapper(module, unsafe_skip_copy=True).resolve(ByteSpanPositionProvider)
        first = spans[head].start
        return {node: (span.start - first, span.start - first + span.length) for node, span in spans.items()}


class _Ways(cst.CSTVisitor):
    """Adds to ``spine`` what leads from a statement to wanted expressions of its own."""

    def __init__(self, wanted: set[cst.BaseExpression], spine: set[cst.CSTNode]) -> None:
        super().__init__()
        self._wanted, self._spine = wanted, spine
        self._above: list[cst.CSTNode] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.BaseParenthesizableWhitespace, cst.BaseSuite, cst.Else, cst.Finally)):
            return False
        self._above.append(node)
        if node in self._wanted:
            self._spine.update(self._above)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self._above and self._above[-1] is original_node:
            self._above.pop()


def _upwards(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterable[ast.AST]:
    current: ast.AST | None = node
    while current is not None:
        yield current
        current = parents.get(current)


def _without_blocks(node: cst.CSTNode) -> cst.CSTNode:
    if isinstance(node, (cst.Try, cst.TryStar)):
        return cst.If(test=cst.Name("x"), body=_STUB)  # a try has no expression of its own
    changes: dict[str, object] = {"leading_lines": ()}
    if isinstance(node, cst.Match):
        changes["cases"] = [cst.MatchCase(pattern=cst.MatchAs(), body=_STUB)]
    else:
        changes["body"] = _STUB
    if isinstance(node, (cst.If, cst.For, cst.While)):
        changes["orelse"] = None
    return node.with_changes(**changes)
