"""One file's text, its byte offsets, comments and layout."""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
import warnings
from functools import cached_property
from pathlib import Path

from rewriter.types import Cells, InputError, place

_NEWLINE = re.compile(rb"\r\n|\n|\r")
_SKIP = re.compile(r"#\s*bmt:\s*skip(?:\[([^\]]*)\])?")
_SKIP_FILE = re.compile(r"#\s*bmt:\s*skip-file")


class Source:
    """Text of a Python file with positions that agree with ``ast``.

    ``data`` is the UTF-8 form without byte order mark; ``offset`` indexes it. ``encode`` gives bytes back in the file's
    own encoding.
    """

    def __init__(self, path: Path, raw: bytes, cells: Cells = ()) -> None:
        self.path = path
        self.cells = cells
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
            raise InputError(f"{self.at(error.lineno or 1)}: cannot parse: {error.msg}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"{self.at(1)}: cannot parse: {error}") from None

    def at(self, line: int) -> str:
        """A line as it is named to the user."""
        return f"{self.path}:{place(self.cells, line)}"

    def encode(self, data: bytes) -> bytes:
        """Bytes of the converted file in the encoding of the original."""
        if self.encoding == "utf-8":
            return self.bom + data
        return self.bom + data.decode("utf-8").encode(self.encoding)

    def place(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg | ast.ExceptHandler) -> tuple[int, int]:
        """Offsets of a node's first byte and of the one behind its last."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def offset(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    @property
    def line_count(self) -> int:
        return len(self._starts)

    def line(self, number: int) -> bytes:
        """A line with its newline."""
        end = self._starts[number] if number < len(self._starts) else len(self.data)
        return self.data[self._starts[number - 1] : end]

    def code(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg) -> str:
        return self.data[slice(*self.place(node))].decode("utf-8", "surrogatepass")

    def is_exact(self, node: ast.expr) -> bool:
        """Whether an expression's position can be trusted: inside f-strings old Pythons report wrong ones."""
        try:
            code = f"({self.code(node)}\n)"  # it may go over several lines in brackets of its own
            return ast.dump(ast.parse(code, mode="eval").body) == ast.dump(node)
        except (SyntaxError, ValueError):
            return False

    def indent(self, node: ast.stmt) -> str:
        """White space before the first statement of the node's line, behind a form feed if there is one."""
        line = self.line(node.lineno)
        white = line[: len(line) - len(line.lstrip(b" \t\x0c"))]
        return white[white.rfind(b"\x0c") + 1 :].decode()

    def owns_lines(self, node: ast.stmt) -> bool:
        """Whether nothing but white space and comments shares a line with the statement."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        before = self.line(node.lineno)[: node.col_offset]
        after = self.line(node.end_lineno)[node.end_col_offset :].strip()
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

    def comment(self, line: int) -> str:
        """What a line says to the converter, if anything."""
        return self.comments.get(line, "") if "bmt:" in self.text else ""

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
