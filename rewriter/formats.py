"""Reports in files: html, json, markdown, sarif."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rewriter import __version__
from rewriter.docs import explain
from rewriter.page import page
from rewriter.report import summary
from rewriter.rules import RULES
from rewriter.types import Conversion, Finding, InputError, Result, place

_STATES = ("applied", "needs --unsafe", "left")


def check_report(path: Path) -> None:
    """Raises InputError where a report has an ending of no format, or where it cannot be a file."""
    if path.suffix not in (".html", ".json", ".md", ".sarif"):
        raise InputError(f"{path}: a report ends in .html, .json, .md or .sarif")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: --report is a file; this is none")


def write_report(path: Path, results: Sequence[Result]) -> str:
    """The report's text, in the format that the file's ending asks for."""
    makers: dict[str, Callable[[Sequence[Result]], str]] = {
        ".html": page, ".json": _json, ".md": _markdown, ".sarif": _sarif,
    }  # fmt: skip
    return makers[path.suffix](results)


def _entries(results: Sequence[Result]) -> Iterator[tuple[Result, str, Finding]]:
    for result in results:
        for state, findings in zip(_STATES, (result.applied, result.hidden, result.reported), strict=True):
            for finding in findings:
                yield result, state, finding


def _json(results: Sequence[Result]) -> str:
    files = []
    for result in results:
        findings = [
            {"code": f.code, **_place(result, f), "message": f.message, "safety": _safety(f), "state": state}
            for _, state, f in _entries([result])
        ]
        entry: dict[str, Any] = {"path": result.path.as_posix(), "changed": result.changed, "findings": findings}
        if result.error:
            entry["error"] = result.error
        files.append(entry)
    return json.dumps({"version": 1, "summary": summary(results), "files": files}, indent=2) + "\n"


def _place(result: Result, finding: Finding) -> dict[str, Any]:
    """A line; in a notebook, that within the cell."""
    at = place(result.cells, finding.line)
    return {"line": int(at.rpartition(":")[2]), **({"at": at} if result.cells else {})}


def _markdown(results: Sequence[Result]) -> str:
    lines = [
        "# bmt-convert",
        "",
        summary(results),
        "",
        "| file | line | rule | state | what |",
        "|---|---|---|---|---|",
    ]
    for result, state, finding in _entries(results):
        message = finding.message.replace("|", "\\|")
        lines.append(
            f"| {result.path.as_posix()} | {place(result.cells, finding.line)} | {finding.code} | {state} | {message} |"
        )
    lines.extend(f"| {result.path.as_posix()} |  |  | error | {result.error} |" for result in results if result.error)
    return "\n".join(lines) + "\n"


def _sarif(results: Sequence[Result]) -> str:
    """As GitHub's code scanning shows it: a rule has its explanation, a place its columns, and files are under here."""
    rules = [
        {
            "id": rule.code,
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": rule.explanation.strip().splitlines()[0]},
            "help": {"text": rule.explanation.strip(), "markdown": explain(rule)},
            "defaultConfiguration": {"level": "warning"},
        }
        for rule in RULES
    ]
    found = [
        {
            "ruleId": finding.code,
            "ruleIndex": next(number for number, rule in enumerate(RULES) if rule.code == finding.code),
            "level": "note" if state == "applied" else "warning",
            "message": {"text": f"{finding.message} ({state})"},
            "locations": [{"physicalLocation": {"artifactLocation": _uri(result.path), **_region(result, finding)}}],
        }
        for result, state, finding in _entries(results)
    ]
    failed = [
        {
            "level": "error",
            "message": {"text": result.error},
            "locations": [{"physicalLocation": {"artifactLocation": _uri(result.path)}}],
        }
        for result in results
        if result.error
    ]
    invocation = {"executionSuccessful": not failed, "toolExecutionNotifications": failed}
    driver = {"name": "bmt-convert", "version": __version__, "semanticVersion": _semantic(), "rules": rules}
    report = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "invocations": [invocation], "results": found}],
    }
    return json.dumps(report, indent=2) + "\n"


def _semantic() -> str:
    """``2.0.0.dev0`` as https://semver.org writes it."""
    return re.sub(r"\.?(dev|a|b|rc)", r"-\1", __version__, count=1)


def _uri(path: Path) -> dict[str, str]:
    full = path.resolve()
    below = full.is_relative_to(Path.cwd())
    return {"uri": full.relative_to(Path.cwd()).as_posix() if below else full.as_uri()}


def _region(result: Result, finding: Finding) -> dict[str, Any]:
    """The line from its first character to its last. What is in a notebook's cells has no line in the file."""
    lines = result.before.splitlines()
    if result.cells or not 0 < finding.line <= len(lines):
        return {}
    line = lines[finding.line - 1].decode("utf-8", "replace")
    first = len(line) - len(line.lstrip())
    return {
        "region": {"startLine": finding.line, "startColumn": first + 1, "endColumn": max(len(line.rstrip()), first) + 1}
    }


def _safety(finding: Finding) -> str:
    if isinstance(finding, Conversion):
        return "unsafe" if finding.unsafe else "safe"
    return "report"
