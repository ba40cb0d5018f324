"""What a script does only where it is asked for."""

from __future__ import annotations

import ast
import re

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.changes import Change, ReplaceStatement, insert_before, replace, template

_ALWAYS = re.compile(r"cuda|__name__|is_initialized")


def under_test(file: File, node: ast.AST) -> bool:
    """Whether a test decides if a node runs, and not one of what the machine has, or of how the file is run."""
    for parent in file.names.ancestors(node):
        if isinstance(parent, ast.match_case):
            return True
        if isinstance(parent, ast.If) and not _ALWAYS.search(file.source.code(parent.test)):
            return True
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return False
    return False


def raised_instead(file: File, call: ast.Call, message: str) -> tuple[Change, ...]:
    """The changes by which a script says that it cannot do something, where a test asks for it; else none.

    Where the test holds unless something else is given (``default="kfac"``, ``use_kfac = True``), it is no choice.
    """
    statement, chosen = file.names.statement_of(call), file.names.parents[call]
    code = f"raise RuntimeError({message!r})".replace("'", '"')
    if isinstance(chosen, ast.IfExp) and file.names.parents[chosen] is statement:
        test = chosen.test
        wanted = "if {test}:" if chosen.body is call else "if not ({test}):"
        if _is_default(file, test) is (chosen.body is call) or _ALWAYS.search(file.source.code(test)):
            return ()
        other = replace(chosen, "{other}", other=chosen.orelse if chosen.body is call else chosen.body)
        return insert_before(statement, wanted, f"    {code}", test=test), other
    if not under_test(file, call) or not file.source.owns_lines(statement):
        return ()
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)) or statement.value is not call:
        return ()
    return () if _runs_by_default(file, statement) else (ReplaceStatement(statement, template(code)),)


def _runs_by_default(file: File, statement: ast.stmt) -> bool:
    """Whether all tests around a statement are known to lead to it where nothing else is given."""
    child: ast.AST = statement
    for parent in file.names.ancestors(statement):
        if isinstance(parent, ast.match_case):
            return False
        if isinstance(parent, ast.If) and _is_default(file, parent.test) is not (child in parent.body):
            return False
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            break
        child = parent
    return True


def _is_default(file: File, test: ast.expr) -> bool | None:
    """Whether a test holds where nothing else is given; None where that is not seen."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            held = _is_default(file, inner)
            return None if held is None else not held
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[ast.Constant(value=wanted)]):
            given = _defaults(file, left)
            return wanted in given if given else None
        case ast.Name() | ast.Attribute():
            given = _defaults(file, test)
            return bool(given[0]) if given else None
    return None


def _defaults(file: File, setting: ast.expr) -> list[object]:
    """What a name, or an option of the command line, is where nothing else is given."""
    if isinstance(setting, ast.Name):
        return [value.value for value in file.names.values_of(setting) if isinstance(value, ast.Constant)]
    name, found = (dotted(setting) or "").split(".")[-1], list[object]()
    for call in file.calls:
        options = [item.value for item in call.args if isinstance(item, ast.Constant)]
        if getattr(call.func, "attr", "") == "add_argument" and f"--{name}" in (
            str(item).replace("-", "_").replace("__", "--", 1) for item in options
        ):
            found += [k.value.value for k in call.keywords if k.arg == "default" and isinstance(k.value, ast.Constant)]
    return found
