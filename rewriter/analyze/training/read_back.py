"""Files that one rank writes before all ranks read them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.read.project import Project
from rewriter.analyze.training.writers import opens_for_writing, takes_path

_READERS = {
    "torch.load", "numpy.load", "numpy.loadtxt", "numpy.genfromtxt", "numpy.memmap", "pandas.read_csv",
    "pandas.read_pickle", "pandas.read_parquet", "safetensors.torch.load_file", "joblib.load", "torchaudio.load",
}  # fmt: skip
_SAVERS = {"numpy.save", "numpy.savez", "numpy.savetxt", "joblib.dump"}
_READING_METHODS = {"read_text", "read_bytes"}
_WRITING_METHODS = {"write_text", "write_bytes"}


def reads_of(
    file: File, project: Project, statement: ast.stmt, files: Iterable[File]
) -> Iterator[tuple[File, ast.Call, ast.If | None]]:
    """The calls that read what a statement writes: later, in another function, or in another branch of a test."""
    written = {ast.dump(path): path for path in _written(file, project, statement)}
    function = file.names.function_of(statement)
    for other in files if written else ():
        for call in other.calls:
            path = written.get(ast.dump(found)) if (found := _path_read(other, project, call)) is not None else None
            if path is None:
                continue
            here = other is file and other.names.function_of(call) is function
            test = _test_between(file, statement, call) if here else None
            if (test is not None or call.lineno > statement.lineno) if here else not isinstance(path, ast.Name):
                yield other, call, test


def _written(file: File, project: Project, statement: ast.stmt) -> Iterator[ast.expr]:
    for call in (item for item in walk(statement) if isinstance(item, ast.Call)):
        opened = takes_path(call) and opens_for_writing(call) and not _appends(call)
        if call.args and (opened or project.external(file, call.func) in _SAVERS):
            yield call.args[0]
        elif isinstance(call.func, ast.Attribute) and call.func.attr in _WRITING_METHODS:
            yield call.func.value


def _path_read(file: File, project: Project, call: ast.Call) -> ast.expr | None:
    if takes_path(call) and call.args and not opens_for_writing(call):
        return call.args[0]
    if project.external(file, call.func) in _READERS and call.args:
        return call.args[0]
    if isinstance(call.func, ast.Attribute) and call.func.attr in _READING_METHODS:
        return call.func.value
    return None


def _appends(call: ast.Call) -> bool:
    given = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    return any(isinstance(mode, ast.Constant) and "a" in str(mode.value) for mode in given)


def _test_between(file: File, one: ast.AST, two: ast.AST) -> ast.If | None:
    """The test in whose two branches two nodes stand."""
    above = {parent: child for child, parent in _steps_up(file, one)}
    for child, parent in _steps_up(file, two):
        if parent in above:
            apart = isinstance(parent, ast.If) and (child in parent.body) is not (above[parent] in parent.body)
            return parent if isinstance(parent, ast.If) and apart else None
    return None


def _steps_up(file: File, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    child = node
    for parent in file.names.ancestors(node):
        yield child, parent
        child = parent
