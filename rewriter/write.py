"""Templates as libcst code: parsed once, their holes filled with nodes of the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import libcst as cst

from rewriter.changes import HOLE, Template

Holes = Mapping[str, cst.BaseExpression]
Statements = Sequence[cst.SimpleStatementLine | cst.BaseCompoundStatement]

_PREFIX = "_hole_of_bmt_"
BARE, OR, AND, NOT, ATOM = range(5)
_EMPTY = cst.Module(body=[])
_ATOMS = (
    cst.Name, cst.Attribute, cst.Call, cst.Subscript, cst.BaseString, cst.List, cst.Set, cst.Dict, cst.ListComp,
    cst.SetComp, cst.DictComp,
)  # fmt: skip
_OPERATIONS = (cst.Comparison, cst.UnaryOperation, cst.BinaryOperation, cst.BaseNumber, cst.Await)
_NEEDS_PARENTHESES = (cst.Tuple, cst.GeneratorExp, cst.Yield, cst.NamedExpr)
"""What stands bare in some places only, so that its parentheses go along."""


class Writer:
    """Makes code of templates. ``bmt`` is the file's name for bmtrain.

    ``indent`` is by how much a new block is indented, where that is not the module's own measure.
    """

    def __init__(self, bmt: str, indent: str | None = None) -> None:
        self.bmt, self.indent = bmt, indent

    def expression(self, code: Template, holes: Holes) -> cst.BaseExpression:
        """A template as an expression."""
        if len(code.holes) == 1 and code.text == f"{{{code.holes[0][0]}}}":
            return holes[code.holes[0][0]]
        parsed = _expression(self._placeholders(code))
        filled = parsed.visit(_Fill(holes)) if holes else parsed
        assert isinstance(filled, cst.BaseExpression)
        return filled

    def argument(self, code: Template, holes: Holes) -> cst.Arg:
        """A template such as ``disable={bmt}.rank() != 0`` as an argument of a call."""
        call = self.expression(Template(f"f({code.text})", code.holes), holes)
        assert isinstance(call, cst.Call)
        return call.args[0]

    def statements(self, lines: Sequence[Template], holes: Holes) -> Statements:
        """Templates as statements. Holes that several lines have in common are copied."""
        parsed = _module("\n".join(map(self._placeholders, lines)))
        filled = parsed.visit(_Fill(holes, self.indent)) if holes or self.indent else parsed
        assert isinstance(filled, cst.Module)
        first, *rest = filled.body
        return [first.with_changes(leading_lines=(*filled.header, *first.leading_lines)), *rest]

    def head(self, code: Template, holes: Holes) -> cst.BaseCompoundStatement:
        """A template such as ``if {bmt}.rank() == 0:`` as a compound statement with an empty block."""
        found = self.statements([Template(f"{code.text}\n    pass", code.holes)], holes)[0]
        assert isinstance(found, cst.BaseCompoundStatement)
        return found.with_changes(body=cst.IndentedBlock(body=[]))

    def _placeholders(self, code: Template) -> str:
        names = {name for name, _ in code.holes}

        def placeholder(match: re.Match[str]) -> str:
            name = match[1]
            return self.bmt if name == "bmt" else f"{_PREFIX}{name}" if name in names else match[0]

        return HOLE.sub(placeholder, code.text)


def in_parentheses(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.with_changes(lpar=[cst.LeftParen(), *node.lpar], rpar=[*node.rpar, cst.RightParen()])


def bare(node: cst.BaseExpression) -> cst.BaseExpression:
    """An expression without the parentheses around it, if it needs none between brackets or commas."""
    if isinstance(node, _NEEDS_PARENTHESES):
        return node if node.lpar else in_parentheses(node)
    if any(comments(paren) for paren in (*node.lpar, *node.rpar)):
        return node
    return node.with_changes(lpar=[], rpar=[])


def comments(*nodes: cst.CSTNode) -> Counter[str]:
    """The comments inside nodes, in the order in which they stand."""
    found = _Comments()
    for node in nodes:
        node.visit(found)
    return Counter(found.texts)


@lru_cache(maxsize=4096)
def _expression(text: str) -> cst.BaseExpression:
    return cst.parse_expression(text)


@lru_cache(maxsize=256)
def _module(text: str) -> cst.Module:
    return cst.parse_module(text + "\n")


def strength(node: cst.BaseExpression) -> int:
    """How tightly an expression binds: ``BARE`` is a choice or less, ``ATOM`` one thing."""
    if node.lpar or isinstance(node, _ATOMS):
        return ATOM
    if isinstance(node, cst.BooleanOperation):
        return OR if isinstance(node.operator, cst.Or) else AND
    return NOT if isinstance(node, _OPERATIONS) else BARE


class _Fill(cst.CSTTransformer):
    """Puts nodes into the holes of a parsed template, in parentheses where they would bind less than they must."""

    def __init__(self, holes: Holes, indent: str | None = None) -> None:
        super().__init__()
        self._indent = indent
        self._holes = {f"{_PREFIX}{name}": node for name, node in holes.items()}
        self._between: set[cst.CSTNode] = set()  # brackets or commas
        self._needed: dict[cst.CSTNode, int] = {}

    def visit_Arg(self, node: cst.Arg) -> None:
        self._between.add(node.value)

    def visit_Element(self, node: cst.Element) -> None:
        self._between.add(node.value)

    def visit_DictElement(self, node: cst.DictElement) -> None:
        self._between.add(node.value)

    def visit_Assign(self, node: cst.Assign) -> None:
        self._needed[node.value] = BARE

    def visit_Expr(self, node: cst.Expr) -> None:
        self._needed[node.value] = BARE

    def visit_If(self, node: cst.If) -> None:
        self._needed[node.test] = BARE

    def visit_WithItem(self, node: cst.WithItem) -> None:
        self._needed[node.item] = BARE

    def visit_IfExp(self, node: cst.IfExp) -> None:
        self._needed |= {node.body: OR, node.test: OR, node.orelse: OR}

    def visit_BooleanOperation(self, node: cst.BooleanOperation) -> None:
        least = OR if isinstance(node.operator, cst.Or) else AND
        self._needed |= {node.left: least, node.right: least + 1}

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return updated_node if self._indent is None else updated_node.with_changes(indent=self._indent)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        node = self._holes.get(original_node.value)
        if node is None:
            return updated_node
        if original_node in self._between:
            return bare(node)
        if original_node.lpar:  # "({x})": the template's own
            return bare(node).with_changes(lpar=original_node.lpar, rpar=original_node.rpar)
        return fitting(node, self._needed.get(original_node, ATOM))


def fitting(node: cst.BaseExpression, needed: int) -> cst.BaseExpression:
    """An expression with parentheses where it must bind more tightly than it does, or spans lines."""
    inner = bare(node)
    if strength(inner) >= needed and not (node.lpar and "\n" in _EMPTY.code_for_node(inner)):
        return inner
    return node if node.lpar else in_parentheses(node)


class _Comments(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def visit_Comment(self, node: cst.Comment) -> None:
        self.texts.append(node.value)
