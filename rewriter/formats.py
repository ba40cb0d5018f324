"""Machine-readable reports: json, markdown, sarif."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rewriter.report import summary
from rewriter.rules import RULES
from rewriter.types import Conversion, Finding, InputError, Result

_STATES = ("applied", "needs --unsafe", "left")


def check_report(path: Path) -> None:
    """Raises InputError where a report has an ending of no format."""
    if path.suffix not in (".json", ".md", ".sarif"):
        raise InputError(f"{path}: a report ends in .json, .md or .sarif")


def write_report(path: Path, results: Sequence[Result]) -> str:
    """The report's text, in the format that the file's ending asks for."""
    makers: dict[str, Callable[[Sequence[Result]], str]] = {".json": _json, ".md": _markdown, ".sarif": _sarif}
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
            {"code": f.code, "line": f.line, "message": f.message, "safety": _safety(f), "state": state}
            for _, state, f in _entries([result])
        ]
        entry: dict[str, Any] = {"path": result.path.as_posix(), "changed": result.changed, "findings": findings}
        if result.error:
            entry["error"] = result.error
        files.append(entry)
    return json.dumps({"version": 1, "summary": summary(results), "files": files}, indent=2) + "\n"


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
        lines.append(f"| {result.path.as_posix()} | {finding.line} | {finding.code} | {state} | {message} |")
    lines.extend(f"| {result.path.as_posix()} |  |  | error | {result.error} |" for result in results if result.error)
    return "\n".join(lines) + "\n"


def _sarif(results: Sequence[Result]) -> str:
    rules = [{"id": rule.code, "shortDescription": {"text": rule.title}} for rule in RULES]
    found = [
        {
            "ruleId": finding.code,
            "level": "note" if state == "applied" else "warning",
            "message": {"text": f"{finding.message} ({state})"},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": result.path.as_posix()},
                        "region": {"startLine": finding.line},
                    }
                }
            ],
        }
        for result, state, finding in _entries(results)
    ]
    driver = {"name": "bmt-convert", "rules": rules}
    report = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": found}],
    }
    return json.dumps(report, indent=2) + "\n"


def _safety(finding: Finding) -> str:
    if isinstance(finding, Conversion):
        return "unsafe" if finding.unsafe else "safe"
    return "report"
