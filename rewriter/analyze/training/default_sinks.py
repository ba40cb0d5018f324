"""Loggers that print without a line of the script that says so: loguru's first sink, structlog's printing."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from rewriter.analyze.read.file import File
from rewriter.analyze.read.project import Project

STRUCTLOG_SETTINGS = {"structlog.configure", "structlog.configure_once"}
_LOGURU = "loguru.logger."
QUIETED = {
    "loguru": (
        ("loguru", "sys"),
        'loguru.logger.configure(handlers=[{"sink": sys.stderr, "level": "WARNING"}])',
    ),
    "structlog": (
        ("logging", "structlog"),
        "structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))",
    ),
}
"""By package what it takes that only warnings are printed on other ranks: modules, and a line."""


def default_sinks(files: Iterable[File], project: Project) -> list[str]:
    """The packages of ``QUIETED`` that print by themselves what some of these files log."""
    files = list(files)
    return [
        package
        for package in QUIETED
        if any(_imports(file, package) for file in files) and not _is_set_up(files, project, package)
    ]


def _imports(file: File, package: str) -> bool:
    if package.encode() not in file.source.data:
        return False
    names = [node.module or "" for node in file.nodes if isinstance(node, ast.ImportFrom) and not node.level]
    names += [alias.name for node in file.nodes if isinstance(node, ast.Import) for alias in node.names]
    return any(name.split(".")[0] == package for name in names)


def _is_set_up(files: list[File], project: Project, package: str) -> bool:
    """Whether the files say themselves where a package prints."""
    for file in files:
        for call in file.calls if package.encode() in file.source.data else ():
            name = project.external(file, call.func)
            if name in STRUCTLOG_SETTINGS | {"structlog.stdlib.recreate_defaults"} and package == "structlog":
                return True
            if name == f"{_LOGURU}remove" and package == "loguru":
                return True
            if name == f"{_LOGURU}configure" and package == "loguru" and sinks_given(call) is not None:
                return True
    return False


def sinks_given(call: ast.Call) -> ast.keyword | None:
    """``handlers=[...]`` of ``logger.configure``, or ``**settings`` that may hold it."""
    given = {keyword.arg: keyword for keyword in call.keywords}
    return given.get("handlers", given.get(None))
