"""One file's text, its byte offsets, comments and statement layout."""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
import warnings
from bisect import bisect_right
from functools import cached_property
from pathlib import Path

from rewriter.types import Edit, InputError, Span

_NEWLINE = re.compile(rb"\r\n|\n|\r")
_SKIP = re.compile(r"#\s*bmt:\s*skip(?:\[([^\]]*)\])?")
_SKIP_FILE = re.compile(r"#\s*bmt:\s*skip-file")


class Source:
    """Text of a Python file with positions that agree with ``ast``.

    ``data`` is the UTF-8 form without byte order mark; spans index into it. ``encode`` gives bytes back in the file's
    own encoding.
    """

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path = path
        self.raw = raw
        self.encoding, self.bom, text = _decode(path, raw)
        self.data = text.encode("utf-8", "surrogatepass")
        self.text = text
        self._starts = [0, *(match.end() for match in _NEWLINE.finditer(self.data))]

    @cached_property
    def tree(self) -> ast.Module:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self.text)
        except SyntaxError as error:
            raise InputError(f"{self.path}:{error.lineno or 1}: cannot parse: {error.msg}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"{self.path}:1: cannot parse: {error}") from None

    def encode(self, data: bytes) -> bytes:
        """Bytes of the converted file in the encoding of the original."""
        if self.encoding == "utf-8":
            return self.bom + data
        return self.bom + data.decode("utf-8").encode(self.encoding)

    @cached_property
    def newline(self) -> str:
        match = _NEWLINE.search(self.data)
        return match.group().decode() if match else "\n"

    def offset(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def line_start(self, line: int) -> int:
        return self._starts[line - 1]

    def line_end(self, line: int) -> int:
        """Offset just after the line's newline."""
        return self._starts[line] if line < len(self._starts) else len(self.data)

    def line_of(self, offset: int) -> int:
        return bisect_right(self._starts, offset)

    def span(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg | ast.excepthandler | ast.alias) -> Span:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self.offset(node.lineno, node.col_offset)
        return Span(start, self.offset(node.end_lineno, node.end_col_offset))

    def slice(self, span: Span) -> str:
        return self.data[span.start : span.end].decode("utf-8", "surrogatepass")

    def code(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg) -> str:
        return self.slice(self.span(node))

    def is_exact(self, node: ast.expr) -> bool:
        """Whether an expression's position can be trusted: inside f-strings old Pythons report wrong ones."""
        try:
            return ast.dump(ast.parse(self.code(node), mode="eval").body) == ast.dump(node)
        except (SyntaxError, ValueError):
            return False

    def indent(self, node: ast.stmt) -> str:
        """White space before the first statement of the node's line."""
        line = self.data[self._margin(node.lineno) : self.line_end(node.lineno)]
        return line[: len(line) - len(line.lstrip(b" \t"))].decode()

    def _margin(self, line: int) -> int:
        """Where a line's indentation begins: behind a form feed, if there is one."""
        start = self.line_start(line)
        text = self.data[start : self.line_end(line)]
        return start + text[: len(text) - len(text.lstrip(b" \t\x0c"))].rfind(b"\x0c") + 1

    def owns_lines(self, node: ast.stmt) -> bool:
        """Whether nothing but white space and comments shares a line with the statement."""
        span = self.span(node)
        before = self.data[self.line_start(node.lineno) : span.start]
        assert node.end_lineno is not None
        after = self.data[span.end : self.line_end(node.end_lineno)].strip()
        return not before.strip() and (not after or after.startswith(b"#"))

    @cached_property
    def indent_unit(self) -> str:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try)):
                first = node.body[0]
                outer, inner = self.indent(node), self.indent(first)
                if first.lineno > node.lineno and inner.startswith(outer) and len(inner) > len(outer):
                    return inner[len(outer) :]
        return "    "

    @cached_property
    def comments(self) -> dict[int, str]:
        """Line number -> comment text."""
        found: dict[int, str] = {}
        if "#" not in self.text:
            return found
        try:
            for token in tokenize.generate_tokens(io.StringIO(self.text, newline="").readline):
                if token.type == tokenize.COMMENT:
                    found[token.start[0]] = token.string
        except (tokenize.TokenError, SyntaxError, IndentationError):
            pass
        return found

    @cached_property
    def skips(self) -> dict[int, frozenset[str]]:
        """Line -> rule codes that ``# bmt: skip[...]`` switches off there; an empty set means all."""
        if "bmt:" not in self.text:
            return {}
        found = {}
        for line, comment in self.comments.items():
            match = _SKIP.search(comment)
            if match and not _SKIP_FILE.search(comment):
                found[line] = frozenset(code.strip() for code in (match[1] or "").split(",") if code.strip())
        return found

    @cached_property
    def skips_file(self) -> bool:
        return "bmt:" in self.text and any(_SKIP_FILE.search(comment) for comment in self.comments.values())

    @cached_property
    def _string_lines(self) -> frozenset[int]:
        """Lines that begin inside a string, so that indenting them would change it."""
        lines: set[int] = set()
        for node in ast.walk(self.tree):
            multiline = isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno != node.lineno
            if multiline and not (isinstance(node, ast.Constant) and not isinstance(node.value, (str, bytes))):
                assert isinstance(node, ast.expr) and node.end_lineno is not None
                lines.update(range(node.lineno + 1, node.end_lineno + 1))
        return frozenset(lines)

    # Edits that depend on layout -------------------------------------------------------------------------------

    def statement_lines(self, node: ast.stmt) -> Span:
        """The statement with its indentation, trailing comment and newline (it must own its lines)."""
        assert node.end_lineno is not None
        return Span(self.line_start(node.lineno), self.line_end(node.end_lineno))

    def insert_before(self, node: ast.stmt, lines: list[str], rank: int = 0) -> Edit:
        """New statements in front of one (of its decorators, if it has any)."""
        line = node.lineno
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.decorator_list:
            line = node.decorator_list[0].lineno
            while not self.data[self._margin(line) :].lstrip(b" \t").startswith(b"@"):
                line -= 1  # a bracket opens between the @ and the expression
        start = self.line_start(line)
        if line == node.lineno and self.data[start : self.span(node).start].strip():
            position = self.span(node).start
            return Edit(Span(position, position), ("".join(f"{line}; " for line in lines),), rank)
        indent = self.indent(node)
        return Edit(Span(start, start), ("".join(f"{indent}{line}{self.newline}" for line in lines),), rank)

    def insert_after(self, node: ast.stmt, lines: list[str], rank: int = 0) -> Edit:
        """New statements behind one, at its indentation."""
        assert node.end_lineno is not None
        end = self.line_end(node.end_lineno)
        if not self.owns_lines(node):
            position = self.span(node).end
            return Edit(Span(position, position), ("".join(f"; {line}" for line in lines),), rank)
        indent = self.indent(node)
        text = "".join(f"{indent}{line}{self.newline}" for line in lines)
        if end == len(self.data) and not self.data.endswith((b"\n", b"\r")):
            text = self.newline + text.removesuffix(self.newline)
        return Edit(Span(end, end), (text,), rank)

    def remove(self, node: ast.stmt) -> Edit:
        """Delete a statement; ``pass`` takes its place where it shares its line."""
        if self.owns_lines(node):
            return Edit(self.statement_lines(node), ())
        return Edit(self.span(node), ("pass",))

    def indented(self, node: ast.stmt) -> list[Edit]:
        """Edits that indent every line of a statement but the first by one unit."""
        assert node.end_lineno is not None
        edits = []
        for line in range(node.lineno + 1, node.end_lineno + 1):
            start = self._margin(line)
            if line not in self._string_lines and self.data[start : self.line_end(line)].strip():
                edits.append(Edit(Span(start, start), (self.indent_unit,), -100))
        return edits

    def dedented(self, node: ast.stmt, indent: str) -> list[Edit]:
        """Edits that bring every line of a statement's lines one block out, to ``indent`` instead of its own."""
        assert node.end_lineno is not None
        own, edits = self.indent(node), []
        for line in range(node.lineno, node.end_lineno + 1):
            start = self._margin(line)
            if line not in self._string_lines and self.data[start : start + len(own)] == own.encode():
                edits.append(Edit(Span(start + len(indent), start + len(own)), ()))
        return edits

    def within(self, node: ast.stmt, head: str) -> list[Edit]:
        """Edits that put a statement under a compound statement's head line."""
        indent, span = self.indent(node), self.span(node)
        return [Edit(span, (f"{head}{self.newline}{indent}{self.indent_unit}", span), 30), *self.indented(node)]

    def wrapped(self, node: ast.stmt, test: str, hoisted: list[tuple[str, Span]], outdent: int = 0) -> list[Edit]:
        """Edits that put a statement under ``if test:``, with some of its expressions evaluated before.

        ``outdent`` is by how many characters other edits move the statement to the left, or, negative, to the right.
        """
        indent, span = self.indent(node)[max(outdent, 0) :], self.span(node)
        if outdent < 0:
            indent += self.indent_unit
        parts: list[str | Span] = []
        for name, place in hoisted:
            parts.extend([f"{name} = ", place, f"{self.newline}{indent}"])
        parts.append(f"if {test}:{self.newline}{indent}{self.indent_unit}")
        position = span.start
        for name, place in hoisted:
            parts.extend([Span(position, place.start), name])
            position = place.end
        parts.append(Span(position, span.end))
        return [Edit(span, tuple(parts), 20), *self.indented(node)]


def _decode(path: Path, raw: bytes) -> tuple[str, bytes, str]:
    bom = codecs.BOM_UTF8 if raw.startswith(codecs.BOM_UTF8) else b""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    except SyntaxError as error:
        raise InputError(f"{path}:1: not UTF-8 and no valid encoding declared ({error.msg or error})") from None
    encoding = "utf-8" if encoding in ("utf-8-sig", "utf-8") else encoding
    try:
        text = raw[len(bom) :].decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise InputError(f"{path}:1: not valid {encoding}: {error}") from None
    if encoding != "utf-8" and text.encode(encoding) != raw[len(bom) :]:
        raise InputError(f"{path}:1: encoding {encoding} does not survive a round trip")
    if "\0" in text:
        raise InputError(f"{path}:1: contains null bytes")
    return encoding, bom, text
